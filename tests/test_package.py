"""The wheel and the source archive: each installs into an empty environment and answers a question."""

import json
import re
import subprocess
import sys
import venv
from http.client import HTTPConnection
from pathlib import Path

import pytest

from tests.serving import environment

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path) -> None:
    """Runs a command and fails if the command fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source archive of the tracked files and the wheel built from it."""
    source = tmp_path_factory.mktemp("source")
    archive = subprocess.run(
        ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in archive.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    out = tmp_path_factory.mktemp("dist")
    # without --wheel, this builds the archive first and the wheel from it
    run(sys.executable, "-m", "build", "--outdir", str(out), str(source), cwd=out)
    return out


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_it_installs_into_an_empty_environment_and_answers(built: Path, pattern: str, tmp_path: Path) -> None:
    (package,) = built.glob(pattern)
    if pattern == "*.whl":
        assert "-cp311-abi3-" in package.name, "one wheel must work with every Python since 3.11"
    venv.create(tmp_path / "env", with_pip=True)
    bin_ = tmp_path / "env" / "bin"
    run(str(bin_ / "python"), "-m", "pip", "install", "-q", str(package), cwd=tmp_path)
    process = subprocess.Popen(
        [str(bin_ / "tinyoai"), "--port", "0"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        banner = ""
        while "curl -N" not in banner:
            line = process.stdout.readline()
            assert line, banner
            banner += line
        found = re.search(r":(\d+)/v1", banner)
        assert found
        connection = HTTPConnection("127.0.0.1", int(found[1]), timeout=60)
        ask = {"model": "tinyoai-chat", "temperature": 0, "messages": [{"role": "user", "content": "Hello!"}]}
        connection.request("POST", "/v1/chat/completions", json.dumps(ask))
        answer = json.loads(connection.getresponse().read())
        connection.request("GET", "/docs/style.css")
        assert connection.getresponse().status == 200, "the package lacks the documentation's files"
        connection.close()
        assert "help" in answer["choices"][0]["message"]["content"]
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    run(str(bin_ / "python"), "-m", "tinyoai", "--version", cwd=tmp_path)
