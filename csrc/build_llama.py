"""Writes `tinyoai/engine/llamacpp/_abi.py`, cffi's description of libllama's C API; `setup.py` refers to it.

cffi reads `llama_api.h` when tinyoai is built, so that a worker needs no parser. No C code is compiled: the library
is opened at run time.
"""

from pathlib import Path

from cffi import FFI

ffi = FFI()
ffi.cdef((Path(__file__).resolve().parent / "llama_api.h").read_text(encoding="utf-8"))
ffi.set_source("tinyoai.engine.llamacpp._abi", None)

if __name__ == "__main__":
    ffi.compile(verbose=True)
