"""The door to libllama: the search for it, processors and systems that cannot run it, and layouts of its structs."""

import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tinyoai.engine.contract import EngineError
from tinyoai.engine.llamacpp import library
from tinyoai.engine.llamacpp.library import LAYOUTS, Found, Library, find, missing_cpu_flags

ROOT = Path(__file__).resolve().parents[3]
API = (ROOT / "csrc" / "llama_api.h").read_text()
FUNCTIONS = [
    name
    for name in re.findall(r"\b(llama_\w+)\(", re.sub(r"/\*.*?\*/", "", API, flags=re.DOTALL))
    if not name.endswith("_default_params")
]


def context_bytes(embeddings: int, **changed: int) -> bytearray:
    """Returns llama.cpp's default llama_context_params with its bools at an offset."""
    values = bytearray(368)
    struct.pack_into("<7I2i5i", values, 0, 512, 2048, 512, 1, 0, 0, 1, 4, 4, 0, -1, -1, -1, -1)
    struct.pack_into("<2i", values, 104, 1, 1)
    values[embeddings : embeddings + 6] = bytes((0, 1, 1, 1, 1, 0))
    for at, value in changed.items():
        values[int(at.removeprefix("at_"))] = value
    return values


def model_bytes() -> bytearray:
    """Returns llama.cpp's default llama_model_params."""
    values = bytearray(336)
    struct.pack_into("<5i", values, 16, -1, 1, -1, 1, 0)
    values[72:78] = bytes((0, 0, 1, 0, 0, 0))
    return values


def stand_in(folder: Path, context: bytearray, model: bytearray | None = None, *, lacking: str = "") -> Found:
    """Compiles a library whose functions do nothing but return these default values."""
    names = [name for name in FUNCTIONS if name not in (lacking, "llama_version")]
    assert len(names) > 30

    def params(name: str, values: bytes) -> str:
        numbers = ",".join(map(str, values))
        return (
            f"typedef struct {{ unsigned char b[{len(values)}]; }} {name}_t;\n"
            f"{name}_t llama_{name}_default_params(void) {{ return ({name}_t){{{{{numbers}}}}}; }}\n"
        )

    code = params("context", context) + params("model", model or model_bytes())
    code += 'const char *llama_version(void) { return "9.9.9-test"; }\n'
    code += "".join(f"void {name}(void) {{}}\n" for name in names)
    (folder / "stand_in.c").write_text(code)
    path = folder / "libllama.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, folder / "stand_in.c"], check=True)
    return Found(path, "")


# -- layouts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_known_layout_is_recognised(tmp_path: Path, layout: library.Layout) -> None:
    opened = Library(stand_in(tmp_path, context_bytes(layout.embeddings)))
    assert opened.layout is layout
    assert opened.llama_version == opened.version == "9.9.9-test"
    params = opened.context_params()
    opened.set_unified(params, True)
    assert bytes(opened.ffi.buffer(opened.ffi.addressof(params)))[layout.kv_unified] == 1
    opened.set_unified(params, False)
    assert (
        bytes(opened.ffi.buffer(opened.ffi.addressof(params)))[: layout.size]
        == context_bytes(layout.embeddings)[: layout.size]
    )


@pytest.mark.parametrize(
    "context",
    [
        context_bytes(144),
        context_bytes(132),
        context_bytes(136, at_141=1),
        context_bytes(136, at_4=1),
        context_bytes(136, at_28=8),
        context_bytes(136, at_104=2),
        # a pointer that is not null where the known layouts have none
        context_bytes(136, at_112=1),
        context_bytes(136, at_120=1),
    ],
    ids=["later", "earlier", "unified", "n_batch", "threads", "type_k", "pointer", "callback"],
)
def test_an_unknown_layout_is_refused_with_its_version(tmp_path: Path, context: bytearray) -> None:
    with pytest.raises(
        EngineError,
        match=r"^libllama\.so of TINYOAI_LLAMA_LIBRARY is llama\.cpp 9\.9\.9-test, whose interface tinyoai does not know",
    ):
        Library(stand_in(tmp_path, context))


def test_other_defaults_of_a_model_are_refused(tmp_path: Path) -> None:
    model = model_bytes()
    model[76] = 1
    with pytest.raises(EngineError, match=r'pip install "tinyoai\[llamacpp\]"'):
        Library(stand_in(tmp_path, context_bytes(136), model))


def test_a_library_that_lacks_a_function_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^libllama\.so of TINYOAI_LLAMA_LIBRARY lacks functions"):
        Library(stand_in(tmp_path, context_bytes(136), lacking="llama_memory_seq_cp"))


# -- what a system lacks ---------------------------------------------------------------------------------


def test_a_library_that_needs_another_says_which(tmp_path: Path) -> None:
    other = tmp_path / "libgone.so.1"
    (tmp_path / "other.c").write_text("int other(void) { return 1; }")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-Wl,-soname,libgone.so.1", "-o", other, tmp_path / "other.c"], check=True
    )
    (tmp_path / "user.c").write_text("int other(void); int user(void) { return other(); }")
    user = tmp_path / "libuser.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", user, tmp_path / "user.c", other], check=True)
    other.unlink()
    with pytest.raises(
        EngineError, match=r"^llama\.cpp needs libgone\.so\.1, which this system lacks; install it$"
    ):
        Library(Found(user, ""))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "cannot load library 'x.so': libgomp.so.1: cannot open shared object file: No such file or directory",
            "llama.cpp needs libgomp.so.1, which this system lacks; install it (Debian, Ubuntu: apt-get install libgomp1)",
        ),
        (
            "cannot load library 'x.so': libstdc++.so.6: cannot open shared object file: No such file",
            "apt-get install libstdc++6",
        ),
        (
            "cannot load library 'x.so': x.so: file too short",
            "x.so of TINYOAI_LLAMA_LIBRARY cannot be opened: file too short; correct TINYOAI_LLAMA_LIBRARY or unset it",
        ),
    ],
)
def test_words_of_the_dynamic_linker(error: str, words: str) -> None:
    assert words in library._why_not_opened(Found(Path("/folder/x.so"), ""), error)


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a library at all" * 100])
def test_a_file_that_is_no_library(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "libllama.so"
    path.write_bytes(content)
    with pytest.raises(EngineError, match="cannot be opened"):
        Library(Found(path, ""))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.so", tmp_path):
        with pytest.raises(EngineError, match="cannot be opened") as refused:
            Library(Found(path, ""))
        assert str(tmp_path.parent) not in str(refused.value)


CPU = "processor\t: 0\nflags\t\t: fpu sse4_2 {}\nbugs\t: none\n"


def test_the_instructions_of_the_prebuilt_library() -> None:
    all_of_them = CPU.format("avx avx2 bmi2 f16c fma")
    assert missing_cpu_flags("x86_64", all_of_them) == []
    assert missing_cpu_flags("x86_64", CPU.format("avx f16c")) == ["avx2", "bmi2", "fma"]
    assert missing_cpu_flags("aarch64", CPU.format("")) == []
    assert missing_cpu_flags("x86_64", "no flags here") == []


def test_a_processor_without_them_never_opens_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(CPU.format("avx"))
    monkeypatch.setattr(library, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(
        EngineError, match=r"no AVX2, BMI2, F16C, FMA, which .* needs; compile one .*: make llamacpp"
    ):
        Library(Found(tmp_path / "none.so", "xllamacpp"))


# -- the search --------------------------------------------------------------------------------------------


def test_the_order_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYOAI_LLAMA_LIBRARY", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find() is None
    with pytest.raises(EngineError, match=r'not installed; run: pip install "tinyoai\[llamacpp\]"'):
        Library()
    prebuilt = tmp_path / "xllamacpp" / "xllamacpp.abi3.so"
    native = tmp_path / "llama_cpp" / "lib" / "libllama.so"
    for path in (prebuilt, native):
        path.parent.mkdir(parents=True)
    prebuilt.touch()
    assert find() == Found(prebuilt, "xllamacpp")  # the other package has no library
    native.touch()
    assert find() == Found(native, "llama_cpp")
    monkeypatch.setenv("TINYOAI_LLAMA_LIBRARY", "/own/libllama.so")
    assert find() == Found(Path("/own/libllama.so"), "")


def test_the_version_is_that_of_the_package(tmp_path: Path) -> None:
    (tmp_path / "xllamacpp-2026.10.11549.dist-info").mkdir()
    (tmp_path / "llama_cpp_python-0.3.36.dist-info").mkdir()
    assert library._package_version(Found(tmp_path / "xllamacpp" / "x.so", "xllamacpp")) == "2026.10.11549"
    native = tmp_path / "llama_cpp" / "lib" / "libllama.so"
    assert library._package_version(Found(native, "llama_cpp")) == "0.3.36"
    assert library._package_version(Found(native, "")) == ""


def test_no_python_of_the_packages_is_imported() -> None:
    code = (
        "import sys; from tinyoai.engine.llamacpp.library import find, Library; f = find(); f and Library(f); "
        "print(sorted({'xllamacpp', 'llama_cpp', 'cffi', 'pycparser'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
