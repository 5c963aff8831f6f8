"""The layout of llama.cpp's structs, as its headers have it, against the one that the library door knows.

The headers are those of llama-cpp-python, which ARM boards compile. A C compiler tells the places of all fields.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import fixtures
from tinyoai.engine.llamacpp import library

ROOT = Path(__file__).parents[3]
STRUCTS = ("llama_context_params", "llama_model_params", "llama_batch")


def declared(struct: str) -> list[str]:
    """The fields of a struct in tinyoai's own declarations."""
    text = (ROOT / "csrc" / "llama_api.h").read_text()
    found = re.search(rf"typedef struct {struct} \{{(.*?)\}}", text, re.DOTALL)
    assert found
    return re.findall(r"(\w+)(?:\[\d+\])?;", found[1])


def probe(folder: Path, headers: Path, include: str, expressions: dict[str, str]) -> dict[str, int]:
    """The numbers that C expressions have, by name; a compiled program prints them."""
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        fixtures.absent("there is no C compiler")
    prints = [f'printf("{name} %zu\\n", (size_t)({value}));' for name, value in expressions.items()]
    source = ["#include <stddef.h>", "#include <stdint.h>", "#include <stdio.h>", f'#include "{include}"']
    (folder / "probe.c").write_text("\n".join([*source, "int main(void) {", *prints, "}", ""]))
    built = subprocess.run(
        [compiler, "-w", "-I", headers, "-o", folder / "probe", folder / "probe.c"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    printed = subprocess.run(
        [folder / "probe"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    return {name: int(number) for name, number in map(str.split, printed.splitlines())}


def offset(struct: str, field: str) -> dict[str, str]:
    """The expression for the place of a field, by the name STRUCT.FIELD."""
    return {f"{struct}.{field}": f"offsetof(struct {struct}, {field})"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Offsets and sizes by the header of llama-cpp-python, as STRUCT.FIELD and STRUCT."""
    headers = fixtures.require(fixtures.llama_headers(), "llama.h")
    text = re.sub(r"//.*", "", (headers / "llama.h").read_text())
    wanted: dict[str, str] = {}
    for struct in STRUCTS:
        found = re.search(rf"struct {struct} \{{(.*?)\n    \}}", text, re.DOTALL)
        assert found, struct
        wanted[struct] = f"sizeof(struct {struct})"
        for field in re.findall(r"(\w+)\s*;", found[1]):
            wanted |= offset(struct, field)
    return probe(tmp_path_factory.mktemp("real"), headers, "llama.h", wanted)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """Offsets by tinyoai's own declarations."""
    wanted: dict[str, str] = {}
    for struct in STRUCTS:
        for field in declared(struct):
            wanted |= offset(struct, field)
    return probe(tmp_path_factory.mktemp("ours"), ROOT / "csrc", "llama_api.h", wanted)


def test_every_declared_field_is_where_the_header_has_it(real: dict[str, int], ours: dict[str, int]) -> None:
    checked = {name: at for name, at in ours.items() if not name.endswith(".tail")}
    assert len(checked) > 40
    assert checked == {name: real.get(name) for name in checked}


def test_the_known_layout_is_that_of_the_header(real: dict[str, int], ours: dict[str, int]) -> None:
    at = {name.partition(".")[2]: offset for name, offset in real.items() if "context_params." in name}
    (known,) = (layout for layout in library.LAYOUTS if layout.name == "0.5.0")
    assert known.abort_callback == at["abort_callback"]
    assert known.embeddings == at["embeddings"]
    assert known.kv_unified == at["kv_unified"]
    assert known.size == real["llama_context_params"]
    bools = ["embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified"]
    assert [at[name] - at["embeddings"] for name in bools] == [0, 1, 2, 3, 4, 5]
    assert ours["llama_context_params.tail"] == library._TAIL


def test_declared_structs_are_at_least_as_long(real: dict[str, int], ours: dict[str, int]) -> None:
    for struct in ("llama_context_params", "llama_model_params"):
        # the tail has 256 bytes
        assert real[struct] <= ours[f"{struct}.tail"] + 256
    assert max(layout.size for layout in library.LAYOUTS) <= ours["llama_context_params.tail"] + 256
