"""Builds the extension module `tinyoai._native` from the C files in this folder; `setup.py` refers to it.

cffi reads the declarations from `api.h`, so there is one copy of them. The module uses only CPython's limited
API: one build works with every Python since 3.11.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent

# cffi's own wrapper functions have parameters that they do not use.
PREAMBLE = """
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <stddef.h>
#include <stdint.h>
#include "api.h"
"""

# No -Werror: a newer compiler's new warning must not stop an install. The tests compile these files with it.
# -Wno-psabi: GCC warns that the ABI of 32-byte vectors has changed; only static functions of one file take them.
# -ffp-contract=off: with fused multiply-adds a seed would give other ids on other machines.
COMPILE_ARGS = [
    "-std=c11",
    "-O3",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-ffp-contract=off",
    "-fvisibility=hidden",
]

ffi = FFI()
ffi.cdef((HERE / "api.h").read_text(encoding="utf-8"))
ffi.set_source(
    "tinyoai._native",
    PREAMBLE,
    sources=[f"csrc/{name}.c" for name in ("sampler", "history", "choose", "simd", "stop_matcher", "hooks")],
    depends=[
        f"csrc/{name}" for name in ("api.h", "sampler.h", "order.h", "simd.h", "simd_loops.h", "build.py")
    ],
    include_dirs=["csrc"],
    extra_compile_args=COMPILE_ARGS,
    libraries=["m"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
