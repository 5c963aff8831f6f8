"""Build options that pyproject.toml cannot hold: the C module, cffi's description of libllama, and the limited API.

One wheel serves every Python from 3.11 on.
"""

from setuptools import setup

setup(
    cffi_modules=["csrc/build.py:ffi", "csrc/build_llama.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
