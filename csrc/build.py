"""Builds the extension module ``tinyoai._native`` from the C files beside this one.

Named by ``setup.py``; ``api.h`` is read as it stands, so there is one copy of every declaration. The module
keeps to CPython's limited interface: one build serves every Python from 3.11 on.
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

# No -Werror here: a compiler newer than ours must not stop an install. The tests compile these files with it.
# -Wno-psabi: 32-byte vectors cross only static functions of one file; how they are passed is our own affair.
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
    sources=["csrc/sampler.c", "csrc/stop.c"],
    depends=["csrc/api.h", "csrc/lanes.h", "csrc/order.h", "csrc/build.py"],
    include_dirs=["csrc"],
    extra_compile_args=COMPILE_ARGS,
    libraries=["m"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffi.compile(verbose=True)
