"""What `status` shows of running servers: tables for people, JSON for programs.

Owns the words and units. What a server said when it was ready comes from `running`, what it does now from its
health, which needs no key, and its memory from /proc. It must not know how servers are started or ended.
"""

import json
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from tinyoai.host import memory
from tinyoai.host.instances import Process, Running, family

PATIENCE_S = 5.0
"""How long a server may take to say how it is."""


def facts(server: Running, place: Path, agent: Process | None) -> dict[str, Any]:
    """Everything there is to say of a server. Sizes are in bytes, lengths in tokens, times in seconds."""
    health = _health(server)
    models = health.get("models", [])
    loaded = [model["id"] for model in models if model["state"] == "ready"]
    mine: dict[str, str] = next((model for model in models if model["id"] == server.model), {})
    used, machine = sum(memory.resident(pid) for pid in family(server.process.pid)), memory.machine()
    return {
        "server": server.server,
        "base_url": server.base_url,
        "docs_url": f"{server.server}/docs",
        "state": health.get("status", "no answer"),
        "pid": server.process.pid,
        "agent": server.process == agent,
        "model": server.model,
        "model_loaded": server.model in loaded,
        "model_state": mine.get("state", "unknown"),
        "reason": mine.get("reason", ""),
        "other_models_loaded": [name for name in loaded if name != server.model],
        "architecture": server.architecture,
        "quantization": server.quantization,
        "context_window": server.n_ctx,
        "model_size": server.file_size,
        "memory_used": used,
        "memory_percent": round(100 * used / machine, 1) if machine else None,
        "flash_attention": False,
        "gpu_layers": server.n_gpu_layers,
        "engine": server.engine,
        "requests_at_a_time": server.n_slots,
        "uptime": max(0, round(time.time() - server.since)),
        "version": server.version,
        "home": str(place),
    }


def table(said: dict[str, Any]) -> str:
    """One server's facts in a box."""
    state = said["state"] if said["state"] != "no answer" else f"no answer within {PATIENCE_S:g} s"
    gone = said["model_state"] not in ("ready", "unknown")
    why = f" ({said['model_state']}{': ' if said['reason'] else ''}{said['reason']})" if gone else ""
    percent = f"{said['memory_percent']}% of this machine's, " if said["memory_percent"] is not None else ""
    rows = [
        ("Server", said["server"]),
        ("Base URL", said["base_url"]),
        ("PID", str(said["pid"])),
        ("Agent", str(said["agent"])),
        ("State", state),
        ("Model", said["model"]),
        ("Model loaded", f"{said['model_loaded']}{why}"),
        ("Other models loaded", ", ".join(said["other_models_loaded"])),
        ("Quantization", said["quantization"]),
        ("Context window", str(said["context_window"])),
        ("Model size", f"{said['model_size'] / 1e6:.1f} MB" if said["model_size"] else ""),
        ("Memory usage", f"{percent}{said['memory_used'] / 1e6:.0f} MB"),
        ("Flash attention", str(said["flash_attention"])),
        ("GPU", f"{said['gpu_layers']} layers, where the engine has one" if said["gpu_layers"] else "none"),
        ("Engine", said["engine"]),
        ("Requests at a time", str(said["requests_at_a_time"])),
        ("Uptime", duration(said["uptime"])),
        ("API docs", said["docs_url"]),
        ("Version", said["version"]),
        ("Home", said["home"]),
    ]
    return box([("Property", "Value"), *((name, value) for name, value in rows if value)])


def box(rows: Sequence[tuple[str, str]]) -> str:
    """Two columns; the first row is their head."""
    clean = [(name, "".join(c if c.isprintable() else "?" for c in value)) for name, value in rows]
    left = max(len(name) for name, _ in clean)
    right = max(len(value) for _, value in clean)
    line = f"+{'-' * (left + 2)}+{'-' * (right + 2)}+"
    lines = [f"| {name:<{left}} | {value:<{right}} |" for name, value in clean]
    return "\n".join([line, lines[0], line, *lines[1:], line])


def duration(seconds: int) -> str:
    """The two largest units of a time: 45 s, 3 min 5 s, 2 h 10 min, 5 d 3 h."""
    days, hours, minutes = seconds // 86_400, seconds // 3600 % 24, seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds % 60} s" if minutes else f"{seconds} s"


def _health(server: Running) -> dict[str, Any]:
    """What the server says now; nothing if it does not answer in time, or not as itself."""
    connection = HTTPConnection(server.host, server.port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/health")
        said = json.loads(connection.getresponse().read(1 << 20))
        good = isinstance(said, dict) and all({"id", "state", "reason"} <= set(m) for m in said["models"])
        return said if good else {}
    except (OSError, HTTPException, ValueError, KeyError, TypeError):
        return {}
    finally:
        connection.close()
