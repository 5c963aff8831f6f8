"""The door to libllama: where it is, whether this machine can run it, and which version's structs it has.

The library is opened directly; no Python code of its package is imported. Two structs are passed by value, and their
layout changes between versions without notice. So the layout is recognised from the library's own default values,
and a library of any other layout is refused.
"""

import os
import platform
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tinyoai.engine.contract import EngineError
from tinyoai.engine.llamacpp.facts import INSTALL, LIBRARY_VARIABLE
from tinyoai.engine.llamacpp.hooks import Log

CPUINFO = Path("/proc/cpuinfo")
CPU_FLAGS = ("avx", "avx2", "bmi2", "f16c", "fma")
"""The instructions that the x86-64 build of xllamacpp uses without asking."""


class Layout(NamedTuple):
    """Offsets in llama_context_params, in bytes, of what differs between versions."""

    name: str
    abort_callback: int
    embeddings: int
    """The first of six bools: embeddings, offload_kqv, no_perf, op_offload, swa_full, kv_unified."""
    size: int

    @property
    def kv_unified(self) -> int:
        """The offset of the last bool."""
        return self.embeddings + 5


LAYOUTS = (
    # builds of about b11549 and later
    Layout("moe_cache_size", abort_callback=120, embeddings=136, size=168),
    # llama-cpp-python 0.3.36
    Layout("0.5.0", abort_callback=112, embeddings=128, size=160),
)
_TAIL = 112
"""The offset of `tail` in llama_context_params, see csrc/llama_api.h."""
_DEFAULT_BOOLS = bytes((0, 1, 1, 1, 1, 0))
_DEFAULT_CONTEXT = {
    "n_ctx": 512,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_seq_max": 1,
    "n_rs_seq": 0,
    "n_outputs_max": 0,
    "n_outputs_max_per_seq": 1,
    "n_threads": 4,
    "n_threads_batch": 4,
    "ctx_type": 0,
    "rope_scaling_type": -1,
    "pooling_type": -1,
    "attention_type": -1,
    "flash_attn_type": -1,
    "type_k": 1,
    "type_v": 1,
}
_DEFAULT_MODEL = {
    "n_gpu_layers": -1,
    "split_mode": 1,
    "load_mode": -1,
    "lazy_mode": 1,
    "main_gpu": 0,
    "vocab_only": False,
    "check_tensors": False,
    "use_extra_bufts": True,
    "no_host": False,
    "no_alloc": False,
    "load_mtp": False,
}


_logs: list[Log] = []
"""Logs that libraries write to. They stay as long as the process: a library keeps the address that it got."""


class Found(NamedTuple):
    """A library on disk."""

    path: Path
    package: str
    """xllamacpp or llama_cpp; empty for the one of TINYOAI_LLAMA_LIBRARY."""

    @property
    def title(self) -> str:
        """Its name in messages. They reach clients, which learn no folder of this machine."""
        return f"{self.path.name} of {self.package or LIBRARY_VARIABLE}"


def find() -> Found | None:
    """The library to use: the one that TINYOAI_LLAMA_LIBRARY names, llama_cpp's, or xllamacpp's; None: no such.

    llama_cpp comes first since it is compiled for the processor that it runs on.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    if named:
        return Found(Path(named), "")
    for package, pattern in (("llama_cpp", "lib/libllama.so"), ("xllamacpp", "xllamacpp*.so")):
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for path in sorted(Path(folder).glob(pattern)):
                return Found(path, package)
    return None


def missing_cpu_flags(machine: str, cpuinfo: str) -> list[str]:
    """The instructions that xllamacpp needs and this processor lacks; empty on other machines than x86-64."""
    if machine not in ("x86_64", "AMD64"):
        return []
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    if found is None:
        return []
    flags = set(found[1].split())
    return [flag for flag in CPU_FLAGS if flag not in flags]


class Library:
    """The opened library. `lib` has its functions, `ffi` its types. Raises EngineError with one sentence."""

    def __init__(self, found: Found | None = None) -> None:
        found = found or find()
        if found is None:
            raise EngineError(f"the llama.cpp library is not installed; run: {INSTALL}")
        if found.package == "xllamacpp":
            _check_processor(found)
        try:
            from tinyoai.engine.llamacpp._abi import (  # type: ignore[import-not-found, import-untyped, unused-ignore]
                ffi,
            )
        except ImportError:
            raise EngineError(
                "tinyoai was built without its description of libllama; build it again: pip install ."
            ) from None
        os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # else a failed assertion starts a debugger
        self.ffi: Any = ffi
        self.path = found.path
        self._title = found.title
        self.lib: Any = _open(ffi, found)
        self.log = Log()
        _logs.append(self.log)
        try:
            for name in dir(self.lib):
                getattr(self.lib, name)
        except (AttributeError, ffi.error):
            raise EngineError(
                f"{found.title} lacks functions of llama.cpp that tinyoai calls; install the known version: {INSTALL}"
            ) from None
        self.llama_version = ffi.string(self.lib.llama_version()).decode("ascii", "replace")
        self.version = _package_version(found) or self.llama_version
        self.lib.llama_log_set(ffi.cast("void *", Log.callback), ffi.cast("void *", self.log.address))
        self.layout = self._recognise()
        self.lib.llama_backend_init()

    def _recognise(self) -> Layout:
        """The layout whose places hold the known default values. Raises EngineError if none does."""
        context = self.lib.llama_context_default_params()
        model = self.lib.llama_model_default_params()
        if _has(context, _DEFAULT_CONTEXT) and _has(model, _DEFAULT_MODEL):
            for layout in LAYOUTS:
                at = layout.embeddings - _TAIL
                before = bytes(self.ffi.buffer(context.tail, at))
                bools = bytes(self.ffi.buffer(context.tail, at + 6))[at:]
                if bools == _DEFAULT_BOOLS and not any(before):
                    return layout
        raise EngineError(
            f"{self._title} is llama.cpp {self.llama_version}, whose interface tinyoai does not know; install the "
            f"known version: {INSTALL}"
        )

    @property
    def identity(self) -> str:
        """A text that differs between libraries whose saved states may differ."""
        about = self.path.stat()
        return f"llama.cpp {self.llama_version} {self.version} {self.layout.name} {about.st_size} {about.st_mtime_ns}"

    def context_params(self) -> Any:
        """The library's default llama_context_params."""
        return self.lib.llama_context_default_params()

    def set_unified(self, params: Any, unified: bool) -> None:
        """Sets kv_unified: whether all sequences share one pool of KV cells."""
        params.tail[self.layout.kv_unified - _TAIL] = int(unified)

    def address(self, function: str) -> int:
        """The address of one of the library's functions."""
        return int(self.ffi.cast("uintptr_t", self.ffi.addressof(self.lib, function)))


def _has(struct: Any, expected: dict[str, int]) -> bool:
    return all(getattr(struct, name) == value for name, value in expected.items())


def _check_processor(found: Found) -> None:
    try:
        cpuinfo = CPUINFO.read_text(errors="replace")
    except OSError:
        return
    missing = missing_cpu_flags(platform.machine(), cpuinfo)
    if missing:
        raise EngineError(
            f"this processor has no {', '.join(missing).upper()}, which the prebuilt llama.cpp library needs; "
            "compile one for it: make llamacpp"
        )


def _open(ffi: Any, found: Found) -> Any:
    try:
        return ffi.dlopen(os.fspath(found.path), os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise EngineError(_why_not_opened(found, str(error))) from None


def _why_not_opened(found: Found, error: str) -> str:
    """The sentence for a library that the dynamic linker refuses."""
    lacking = re.search(r"(lib[\w+.-]+\.so[.\d]*): cannot open shared object file", error)
    if lacking and lacking[1] != found.path.name:
        package = {"libgomp.so.1": "libgomp1", "libstdc++.so.6": "libstdc++6"}.get(lacking[1], "")
        how = f" (Debian, Ubuntu: apt-get install {package})" if package else ""
        return f"llama.cpp needs {lacking[1]}, which this system lacks; install it{how}"
    reason = error.rpartition(": ")[2]
    remedy = f"install it again: {INSTALL}" if found.package else f"correct {LIBRARY_VARIABLE} or unset it"
    return f"the llama.cpp library {found.title} cannot be opened: {reason}; {remedy}"


def _package_version(found: Found) -> str:
    """The version of the package that a library comes from; empty if it comes from none."""
    if not found.package:
        return ""
    folder = found.path.parent if found.package == "xllamacpp" else found.path.parent.parent
    distribution = {"llama_cpp": "llama_cpp_python"}.get(found.package, found.package)
    for info in folder.parent.glob(f"{distribution}-*.dist-info"):
        return info.name.removesuffix(".dist-info").rpartition("-")[2]
    return ""
