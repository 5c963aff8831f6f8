"""Compiles the C tests and fuzz targets. Run as a program, it fuzzes.

    python -m tests.csrc.programs --seconds 30      runs every fuzz target for 30 s, from a new seed

With clang the fuzz targets use libFuzzer, which keeps its corpus in `csrc/build/corpus-*`. Without clang,
`fuzz_main.c` makes random inputs.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent.parent / "csrc"
WORK = CSRC / "build"

STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off", "-I", str(CSRC)]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAVOURS = {
    "optimized": ["-O3"],
    "portable": ["-O2", "-DTOAI_PORTABLE"],
    "sanitized": ["-g", "-O1", *SANITIZERS],
}

SAMPLER = [str(CSRC / f"{name}.c") for name in ("sampler", "history", "choose", "simd")]
# test_stop_matcher.c includes stop_matcher.c, to test its static functions; test_hooks.c includes hooks.c.
SOURCES = {
    "test_sampler": ["test_sampler.c", *SAMPLER],
    "test_stop_matcher": ["test_stop_matcher.c"],
    "test_hooks": ["test_hooks.c"],
    "fuzz_sampler": ["fuzz_sampler.c", *SAMPLER, "fuzz_main.c"],
    "fuzz_stop_matcher": ["fuzz_stop_matcher.c", str(CSRC / "stop_matcher.c"), "fuzz_main.c"],
}
FUZZ_TARGETS = [name for name in SOURCES if name.startswith("fuzz_")]


def compile_program(name: str, flavour: str, folder: Path) -> Path:
    """Compiles a program with `$CC` or cc and returns its path. Raises CalledProcessError on failure."""
    program = folder / f"{name}-{flavour}"
    sources = [str(HERE / source) for source in SOURCES[name]]
    compiler = os.environ.get("CC", "cc").split()
    subprocess.run([*compiler, *STRICT, *FLAVOURS[flavour], *sources, "-o", program, "-lm"], check=True)
    return program


def _compile_libfuzzer(name: str, clang: str) -> Path:
    program = WORK / f"{name}-libfuzzer"
    sources = [str(HERE / source) for source in SOURCES[name] if source != "fuzz_main.c"]
    flags = ["-g", "-O1", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run([clang, *STRICT, *flags, *sources, "-o", program, "-lm"], check=True)
    return program


def fuzz(name: str, seconds: int) -> int:
    """Runs one target for `seconds`. Returns its exit status: 0 if it found nothing."""
    WORK.mkdir(exist_ok=True)
    clang = shutil.which("clang")
    command: list[str | Path]
    if clang:
        corpus = WORK / f"corpus-{name}"
        corpus.mkdir(exist_ok=True)
        command = [_compile_libfuzzer(name, clang), f"-max_total_time={seconds}", "-max_len=8192", corpus]
    else:
        program = compile_program(name, "sanitized", WORK)
        command = [program, str(time.time_ns() // 1000), str(seconds), "0"]
    print(f"{name}: {seconds} s", flush=True)
    return subprocess.run(command, cwd=WORK).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz the C module under sanitizers.")
    parser.add_argument("--seconds", type=int, default=30, help="time for each target (default %(default)s)")
    parser.add_argument(
        "targets", nargs="*", metavar="target", help=" or ".join(FUZZ_TARGETS) + " (default: all)"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(FUZZ_TARGETS)
    if unknown:
        parser.error(f"unknown target: {', '.join(sorted(unknown))}; available: {', '.join(FUZZ_TARGETS)}")
    return max(fuzz(name, arguments.seconds) for name in arguments.targets or FUZZ_TARGETS)


if __name__ == "__main__":
    sys.exit(main())
