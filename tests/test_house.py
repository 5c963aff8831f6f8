"""Rules of the package: imports between modules, processes, and the length of modules."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyoai"

FLOORS = {
    "": -1, "errors": -1, "frames": -1, "prompts": -1, "sampling": -1, "units": -1, "_native": -1,
    "host": 0, "wire": 0, "native": 0, "builtin": 0,
    "metrics": 1, "gguf": 1, "text": 1,
    "config": 2, "engine": 2, "web": 2,
    "models": 3,
    "finetune": 4,
    "api": 5,
    "app": 6,
    "cli": 7,
    "__main__": 8,
}  # fmt: skip
"""Packages and top-level modules by floor. Each imports only from lower floors. "" is the package itself."""

DOORS = {
    "tinyoai._native": {"native.py", "engine/llamacpp/hooks.py"},
    "tinyoai.engine.llamacpp._abi": {"engine/llamacpp/library.py"},
    "h11": {"web/body.py", "web/connection.py", "web/exchange.py"},
    "_cffi_backend": {"engine/ctransformers/library.py"},
    "ctypes": {
        "engine/ctransformers/library.py",
        "engine/__main__.py",
        "engine/time_limit.py",
        "finetune/__main__.py",
    },
    # its import loads libraries that are not used: library.py opens the one it needs
    "ctransformers": set(),
    # as with ctransformers
    "llama_cpp": set(),
    "xllamacpp": set(),
    "jinja2": {"text/jinja.py"},
    "sqlite3": {"models/registry.py"},
    # the agent is started and left alone, so no event loop waits for it
    "subprocess": {"host/process.py", "cli/agent.py"},
    "multiprocessing": set(),
    "torch": {"finetune/llama.py", "finetune/train.py"},
    "peft": set(),
    "transformers": set(),
    "uvloop": {"app.py"},
    "prometheus_client": {"metrics.py"},
    # only its files are used; find_spec finds them
    "openapi_ui_bundles": set(),
    "signal": {
        "app.py",
        "cli/agent.py",
        "engine/__main__.py",
        "engine/fake.py",
        "engine/time_limit.py",
        "finetune/runner.py",
        "host/process.py",
        "host/subproc.py",
        "models/worker.py",
    },
    "pickle": set(),
    "training": set(),
    # importing it doubles a worker's start-up time, so only embeddings and training pay for it
    "numpy": {"engine/pooling.py", "finetune/llama.py", "finetune/train.py", "finetune/weights.py"},
    "gguf": {"finetune/weights.py"},
}
"""Modules with one door each: the only files that may import them."""

CALLS = {
    "create_subprocess_exec": set(),
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
"""Functions that start or end processes or hide an import, and the only files that may use them."""

BLOCKING = {"socket", "select", "selectors", "asyncio", "threading", "time"}
"""Modules that pure packages do not import."""

PURE = {"gguf", "text"}

MAX_LINES = 450

FACTS = "tinyoai.engine.facts"
"""The one module of `engine` that the server imports. It imports the engines' own facts.py."""

TRAINER = "finetune/__main__.py"
"""A separate process that loads an engine for its tokenizer."""

SERVER_LACKS = {"tinyoai.text.template", "tinyoai.text.jinja", "tinyoai.native", "numpy", "torch", "ctypes"}
"""Modules that no import chain from the server's program reaches: they belong to worker processes."""

MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "_abi.py"]
"""Our own modules; the build writes _abi.py."""


def name_of(path: Path) -> str:
    """Returns the path below the package, as the tables have it."""
    return path.relative_to(PACKAGE).as_posix()


def unit(path: Path) -> str:
    """Returns the package or top-level module that a file belongs to."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py").replace("__init__", "")


def imports(path: Path) -> list[str]:
    """Returns the full names of all modules and names that a file imports, at any depth."""
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


def file_of(module: str) -> Path | None:
    """Returns the file of a module of this package, or None for any other name."""
    if module.split(".")[0] != "tinyoai":
        return None
    place = PACKAGE.joinpath(*module.split(".")[1:])
    candidates = (
        (place.with_suffix(".py"), place / "__init__.py") if place != PACKAGE else (place / "__init__.py",)
    )
    return next((path for path in candidates if path.is_file()), None)


def reachable(start: str) -> dict[str, str]:
    """Returns all modules that a module imports, directly or not, with the file that imports each."""
    found: dict[str, str] = {}
    pending = [start]
    while pending:
        module = pending.pop()
        path = file_of(module)
        if path is None:
            continue
        for imported in imports(path):
            if imported not in found:
                found[imported] = name_of(path)
                pending.append(imported)
    return found


def test_the_package_is_found() -> None:
    assert len(MODULES) > 60


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    mine = unit(path)
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] != "tinyoai" or len(parts) == 1:
            continue
        other = parts[1]
        if other == "__version__" or other == mine:
            continue
        assert other in FLOORS, f"{name_of(path)} imports {imported}, which is on no floor"
        assert FLOORS[other] < FLOORS[mine], (
            f"{name_of(path)} (floor {FLOORS[mine]}) imports {imported} (floor {FLOORS[other]})"
        )


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_each_foreign_module_has_one_door(path: Path) -> None:
    for imported in imports(path):
        for foreign, doors in DOORS.items():
            if imported == foreign or imported.startswith(foreign + "."):
                assert name_of(path) in doors, f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_few_modules_start_or_end_processes(path: Path) -> None:
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
    "path", [p for p in MODULES if unit(p) != "engine" and name_of(p) != TRAINER], ids=name_of
)
def test_outside_a_worker_only_facts_of_engines_are_imported(path: Path) -> None:
    for imported in imports(path):
        if imported.split(".")[:2] == ["tinyoai", "engine"]:
            facts = imported in ("tinyoai.engine", FACTS) or imported.startswith(FACTS + ".")
            assert facts or imported.endswith(".facts"), f"{name_of(path)} imports {imported}"


@pytest.mark.parametrize("module", sorted(SERVER_LACKS))
def test_the_server_does_not_import_what_belongs_to_workers(module: str) -> None:
    found = reachable("tinyoai.app")
    assert module not in found, f"{found[module]} imports {module}"


def test_engine_facts_import_no_engine() -> None:
    for imported, importer in reachable(FACTS).items():
        assert not imported.endswith((".library", ".engine.contract", ".opening")), (
            f"{importer} imports {imported}"
        )


@pytest.mark.parametrize("path", [p for p in MODULES if unit(p) in PURE], ids=name_of)
def test_pure_packages_wait_for_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Await | ast.AsyncFunctionDef), name_of(path)
    for imported in imports(path):
        assert imported.split(".")[0] not in BLOCKING, name_of(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), name_of(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_too_long(path: Path) -> None:
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= MAX_LINES, f"{name_of(path)} has {n_lines} lines; the limit is {MAX_LINES}"
