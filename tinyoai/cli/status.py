"""The `status` command: collects facts of running servers and prints them as tables or JSON.

The facts come from a server's instance record, its GET /health, which needs no key, and /proc.
"""

import json
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from tinyoai.cli import agent
from tinyoai.cli import help as texts
from tinyoai.cli.parser import HOME, Parser, data_dir
from tinyoai.errors import UsageError
from tinyoai.host import instances, memory
from tinyoai.host.instances import InstanceRecord, Process

TIMEOUT_S = 5.0
"""Seconds that a server may take to answer GET /health."""


def run(argv: Sequence[str]) -> int:
    """Prints all running servers of the data directory."""
    return show("status", "Shows the running servers of a data directory.", argv, agent_only=False)


def show(command: str, about: str, argv: Sequence[str], *, agent_only: bool) -> int:
    """Prints the running servers. Raises UsageError with exit code 3 if there are none."""
    parser = Parser(
        command, about=about, examples=texts.STATUS.replace("tinyoai status", f"tinyoai {command}")
    )
    parser.add_option(HOME)
    parser.add_flag(
        "--json", action="store_true", help="print a JSON list; sizes are in bytes, times in seconds"
    )
    flags = parser.flags(argv)
    folder = data_dir(flags)
    process = agent.current(folder)
    records = [record for record in instances.servers(folder) if not agent_only or record.process == process]
    found = [facts(record, folder, process) for record in records]
    if flags["json"]:
        print(json.dumps(found, indent=2))
    else:
        print("\n\n".join(map(table, found)), end="\n" if found else "")
    if found:
        return 0
    if process is not None:
        raise UsageError(f"the agent (pid {process.pid}) is starting; see tinyoai agent logs", exit_code=3)
    which = "agent" if agent_only else "server"
    raise UsageError(f"no {which} is running; start one with: tinyoai agent start", exit_code=3)


def facts(record: InstanceRecord, data_dir: Path, agent_process: Process | None) -> dict[str, Any]:
    """A server's facts. Sizes are in bytes, lengths in tokens, times in seconds."""
    health = _health(record)
    models = health.get("models", [])
    loaded = [model["id"] for model in models if model["state"] == "ready"]
    main: dict[str, str] = next((model for model in models if model["id"] == record.model), {})
    used = sum(memory.resident(pid) for pid in instances.family(record.process.pid))
    total = memory.total()
    return {
        "server": record.url,
        "base_url": record.base_url,
        "docs_url": f"{record.url}/docs",
        "state": health.get("status", "no answer"),
        "pid": record.process.pid,
        "agent": record.process == agent_process,
        "model": record.model,
        "model_loaded": record.model in loaded,
        "model_state": main.get("state", "unknown"),
        "reason": main.get("reason", ""),
        "other_models_loaded": [name for name in loaded if name != record.model],
        "architecture": record.architecture,
        "quantization": record.quantization,
        "context_window": record.n_ctx,
        "model_size": record.file_size,
        "memory_used": used,
        "memory_percent": round(100 * used / total, 1) if total else None,
        "flash_attention": record.flash_attention,
        "gpu_layers": record.n_gpu_layers,
        "engine": record.engine,
        "engine_version": record.engine_version,
        "requests_at_a_time": record.n_slots,
        "uptime": max(0, round(time.time() - record.since)),
        "version": record.version,
        "home": str(data_dir),
    }


def table(facts: dict[str, Any]) -> str:
    """One server's facts as a table."""
    state = facts["state"] if facts["state"] != "no answer" else f"no answer within {TIMEOUT_S:g} s"
    model_state = ""
    if facts["model_state"] not in ("ready", "unknown"):
        reason = f": {facts['reason']}" if facts["reason"] else ""
        model_state = f" ({facts['model_state']}{reason})"
    percent = f"{facts['memory_percent']}% of the machine, " if facts["memory_percent"] is not None else ""
    rows = [
        ("Server", facts["server"]),
        ("Base URL", facts["base_url"]),
        ("PID", str(facts["pid"])),
        ("Agent", str(facts["agent"])),
        ("State", state),
        ("Model", facts["model"]),
        ("Model loaded", f"{facts['model_loaded']}{model_state}"),
        ("Other models loaded", ", ".join(facts["other_models_loaded"])),
        ("Quantization", facts["quantization"]),
        ("Context window", str(facts["context_window"])),
        ("Model size", f"{facts['model_size'] / 1e6:.1f} MB" if facts["model_size"] else ""),
        ("Memory usage", f"{percent}{facts['memory_used'] / 1e6:.0f} MB"),
        ("Flash attention", str(facts["flash_attention"])),
        (
            "GPU",
            f"{facts['gpu_layers']} layers, if the engine supports it" if facts["gpu_layers"] else "none",
        ),
        ("Engine", f"{facts['engine']} {facts['engine_version']}".strip()),
        ("Requests at a time", str(facts["requests_at_a_time"])),
        ("Uptime", duration(facts["uptime"])),
        ("API docs", facts["docs_url"]),
        ("Version", facts["version"]),
        ("Home", facts["home"]),
    ]
    return box([("Property", "Value"), *((name, value) for name, value in rows if value)])


def box(rows: Sequence[tuple[str, str]]) -> str:
    """A table of two columns; the first row is the header."""
    clean = [(name, "".join(c if c.isprintable() else "?" for c in value)) for name, value in rows]
    left = max(len(name) for name, _ in clean)
    right = max(len(value) for _, value in clean)
    line = f"+{'-' * (left + 2)}+{'-' * (right + 2)}+"
    lines = [f"| {name:<{left}} | {value:<{right}} |" for name, value in clean]
    return "\n".join([line, lines[0], line, *lines[1:], line])


def duration(seconds: int) -> str:
    """A duration in its two largest units: 45 s, 3 min 5 s, 2 h 10 min, 5 d 3 h."""
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _health(record: InstanceRecord) -> dict[str, Any]:
    """The server's GET /health; empty if it does not answer in time or answers something else."""
    connection = HTTPConnection(record.host, record.port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/health")
        answer = json.loads(connection.getresponse().read(1 << 20))
        valid = isinstance(answer, dict) and all(
            {"id", "state", "reason"} <= set(model) for model in answer["models"]
        )
        return answer if valid else {}
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return {}
    finally:
        connection.close()
