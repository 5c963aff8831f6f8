"""Which files llama.cpp can run, whether it is installed, and how much memory a load takes.

llama.cpp ends its process over many a file that it does not expect; so the numbers that it relies on are checked
here, before a native library reads them. Files that fail may be valid for another engine and are not called damaged.
"""

import os
from functools import cache
from importlib.util import find_spec

from tinyoai import gguf
from tinyoai.engine.llamacpp import rank_head
from tinyoai.engine.llamacpp.architectures import DECODERS, ENCODERS, REFUSED
from tinyoai.engine.llamacpp.header_check import HeaderError, check
from tinyoai.engine.llamacpp.memory import estimate, hparams

__all__ = ["INSTALL", "MAX_CONTEXT", "N_BATCH", "N_CHUNK", "estimate", "hparams", "installed", "supports"]

N_BATCH = 512
"""Prompt tokens of a step that nobody waits for."""
N_CHUNK = 64
"""Prompt tokens of a step beside decoding rows: the fewest with which llama.cpp's attention takes its fast path."""
MAX_CONTEXT = 32_768
"""Tokens of a context window that nobody chose, at most."""
LIBRARY_VARIABLE = "TINYOAI_LLAMA_LIBRARY"
"""The environment variable with the path of a library of one's own."""
PACKAGES = ("llama_cpp", "xllamacpp")
"""Packages that bring the library, in the order in which they are searched."""
INSTALL = 'pip install "tinyoai[llamacpp]"'
"""The command that installs the library."""


@cache
def installed() -> bool:
    """Whether there is a library to load. No native code is loaded; the answer holds as long as the process."""
    return bool(os.environ.get(LIBRARY_VARIABLE)) or any(find_spec(name) is not None for name in PACKAGES)


def supports(header: gguf.Header) -> str | None:
    """Why llama.cpp cannot run the file, in words that follow the file's name; None if it can."""
    arch = header.architecture
    if not arch:
        return "names no architecture in its header; convert the model again"
    if arch in REFUSED:
        return REFUSED[arch]
    if arch not in DECODERS and arch not in ENCODERS:
        return (
            f"is a {arch[:40]} model, which this version of the llama.cpp engine does not know; "
            "choose another model, or update tinyoai"
        )
    try:
        check(header)
    except HeaderError as error:
        return str(error)
    return rank_head.fault(header) if rank_head.ranks(header) else None
