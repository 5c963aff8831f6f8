"""The house's walls: every import is held against the floors and the doors."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyoai"

FLOORS = {
    "errors": -1, "_native": -1,
    "sampling": -1, "units": -1,
    "host": 0, "wire": 0, "native": 0,
    "metrics": 1, "gguf": 1, "text": 1,
    "config": 2,
    "engine": 2, "web": 2,
    "models": 3,
    "finetune": 4,
    "api": 5,
    "app": 6, "cli": 7, "__main__": 8,
    "": -1, "builtin": 0,
}  # fmt: skip
"""Rooms by floor; "" is the package itself, which holds its version alone."""

DOORS = {
    "tinyoai._native": {"native.py"},
    "h11": {"web/connection.py", "web/exchange.py"},
    "_cffi_backend": {"engine/ctransformers/library.py"},
    "ctypes": {"engine/ctransformers/library.py", "engine/__main__.py", "finetune/__main__.py"},
    "ctransformers": set(),
    "llama_cpp": {"engine/llamacpp.py"},
    "jinja2": {"text/template.py"},
    "sqlite3": {"models/registry.py"},
    # the agent is started and left to itself: no event loop waits for it
    "subprocess": {"host/process.py", "finetune/runner.py", "cli/agent.py"},
    "multiprocessing": set(),
    "torch": {"finetune/llama.py", "finetune/train.py"},
    "peft": {"finetune/train.py"},
    "transformers": {"finetune/train.py"},
    "uvloop": {"app.py"},
    "prometheus_client": {"metrics.py"},
    # of its files only: they are read where find_spec finds them
    "openapi_ui_bundles": set(),
    # the worker ignores Ctrl-C, the server's handle names what ended a worker, the fake engine dies on demand, the
    # agent is told to stop
    "signal": {
        "app.py",
        "cli/agent.py",
        "engine/__main__.py",
        "models/worker.py",
        "engine/fake.py",
        "finetune/runner.py",
        # what a child ignores, and the words for what ended it
        "host/subproc.py",
    },
    "pickle": set(),
    "training": set(),
    # its import takes as long as the rest of a worker's start: only a worker that embeds pays for it, and training
    "numpy": {"engine/pooling.py", "finetune/llama.py", "finetune/weights.py"},
    "gguf": {"finetune/weights.py"},
}
"""Foreign things, and the only modules that may import them."""

CALLS = {
    "create_subprocess_exec": {"finetune/runner.py"},
    "create_subprocess_shell": set(),
    "Popen": {"host/process.py", "cli/agent.py"},
    "fork": set(),
    "forkpty": set(),
    "posix_spawn": set(),
    "posix_spawnp": set(),
    "popen": set(),
    "system": set(),
    "kill": {"host/process.py", "cli/agent.py", "models/worker.py", "finetune/runner.py", "engine/fake.py"},
    "killpg": set(),
    "import_module": set(),
    "__import__": set(),
}
"""Names that start or end processes, or import past this test, and the only modules that may use them."""

WAITING = {"socket", "select", "selectors", "asyncio", "threading", "time"}
"""What the pure floor does without."""

TRAINER = "finetune/__main__.py"
"""A process of its own, as a worker is: it tokenizes with the engine that will serve what it makes."""

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The path as the tables have it."""
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    """The room a module is in."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py").replace("__init__", "")


def imports(path: Path) -> list[str]:
    """Every module that is imported anywhere in a file, by its full name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} has a relative import"
            module = node.module or ""
            found.append(module)
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def test_the_package_is_where_it_is_looked_for() -> None:
    assert len(MODULES) > 20


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    mine = room(path)
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] != "tinyoai" or len(parts) == 1:
            continue
        other = parts[1]
        if other == "__version__" or other == mine:
            continue
        assert other in FLOORS, f"{name_of(path)} imports {imported}, a room that is on no floor"
        assert FLOORS[other] < FLOORS[mine], (
            f"{name_of(path)} (floor {FLOORS[mine]}) imports {imported} (floor {FLOORS[other]})"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_foreign_things_come_in_by_one_door(path: Path) -> None:
    for imported in imports(path):
        for foreign, doors in DOORS.items():
            if imported == foreign or imported.startswith(foreign + "."):
                assert name_of(path) in doors, f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_processes_are_started_in_one_place(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        used: list[str] = []
        if isinstance(node, ast.Attribute):
            used = [node.attr]
        elif isinstance(node, ast.Name) and node.id == "__import__":
            used = [node.id]
        elif isinstance(node, ast.ImportFrom):
            used = [alias.name for alias in node.names]
        for name in used:
            assert name not in CALLS or name_of(path) in CALLS[name], f"{name_of(path)} uses {name}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if room(p) != "engine" and name_of(p) != TRAINER], ids=name_of
)
def test_only_a_worker_imports_the_engine(path: Path) -> None:
    for imported in imports(path):
        allowed = imported in ("tinyoai.engine", "tinyoai.engine.facts") or imported.startswith(
            "tinyoai.engine.facts."
        )
        assert allowed or imported.split(".")[:2] != ["tinyoai", "engine"], (
            f"{name_of(path)} imports {imported}"
        )


@pytest.mark.parametrize("path", [p for p in MODULES if room(p) in ("gguf", "text")], ids=name_of)
def test_the_pure_floor_waits_for_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Await | ast.AsyncFunctionDef), name_of(path)
    for imported in imports(path):
        assert imported.split(".")[0] not in WAITING, name_of(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), name_of(path)
