"""The `cache` command: shows and clears the conversations that are kept on disk.

It reads the files' headers alone; a server need not run, and a running one notices that files are gone.
"""

import json
import os
import time
from collections.abc import Sequence
from typing import Any

from tinyoai import units
from tinyoai.cli import help as texts
from tinyoai.cli.parser import HOME, Parser, data_dir
from tinyoai.cli.status import duration
from tinyoai.config import config_file
from tinyoai.config.resolve import resolve
from tinyoai.errors import UsageError
from tinyoai.host import cache_files
from tinyoai.host.cache_files import Damaged, Folder, NotOurs

CLEAR = "clear"


def run(argv: Sequence[str]) -> int:
    """Shows the entries by model, or deletes them."""
    if argv and argv[0] == CLEAR:
        return _clear(argv[1:])
    parser = Parser(
        "cache", about="Shows the conversations that are kept on disk for a restart.", examples=texts.CACHE
    )
    parser.add_option(HOME)
    parser.add_flag(
        "--json", action="store_true", help="print JSON; sizes are in bytes, times in seconds since 1970"
    )
    flags = parser.flags(argv)
    home = data_dir(flags)
    config = resolve({}, os.environ, config_file.read(home))
    try:
        limit = units.size(config.cache_disk)
    except ValueError as error:
        raise UsageError(f"--cache-disk: {config.cache_disk!r}: {error}") from None
    facts = summary(Folder(home / cache_files.FOLDER, limit))
    print(json.dumps(facts, indent=2) if flags["json"] else table(facts, time.time()))
    return 0


def _clear(argv: Sequence[str]) -> int:
    parser = Parser(
        "cache clear", about="Deletes the conversations of a model, or of all models.", examples=texts.CACHE
    )
    parser.add_option(HOME)
    parser.add_argument("model", nargs="?", default="", metavar="MODEL", help="only this model's")
    flags = parser.flags(argv)
    folder = Folder(data_dir(flags) / cache_files.FOLDER)
    n, n_bytes, known = 0, 0, set()
    for file in folder.files():
        model, _ = _header(file)
        known.add(model)
        if flags["model"] in ("", model):
            folder.remove(file.path)
            n, n_bytes = n + 1, n_bytes + file.size
    if flags["model"] and not n:
        others = f"; there are some of {', '.join(sorted(known))}" if known else ""
        raise UsageError(f"no conversation of {flags['model']} is kept in {folder.path}{others}", exit_code=1)
    left = len(folder.files()) if not flags["model"] else 0
    if left:
        raise UsageError(
            f"{left} files in {folder.path} cannot be deleted; look at its permissions", exit_code=1
        )
    print(f"deleted {n} conversation{'' if n == 1 else 's'}, {n_bytes / 1e6:.1f} MB")
    return 0


def _header(file: cache_files.Found) -> tuple[str, int]:
    """The model and the number of tokens of a file."""
    try:
        header = cache_files.read_header(file.path)
    except (Damaged, NotOurs):
        return "unreadable", 0
    return header.model, header.n_tokens


def summary(folder: Folder) -> dict[str, Any]:
    """The entries by model, the totals and the limits. Sizes are in bytes, times in seconds since 1970."""
    models: dict[str, dict[str, Any]] = {}
    for file in folder.files():
        model, n_tokens = _header(file)
        row = models.setdefault(model, {"model": model, "entries": 0, "tokens": 0, "size": 0, "last_used": 0})
        row["entries"] += 1
        row["tokens"] += n_tokens
        row["size"] += file.size
        row["last_used"] = max(row["last_used"], round(file.used_at))
    return {
        "folder": str(folder.path),
        "models": list(models.values()),
        "entries": sum(row["entries"] for row in models.values()),
        "size": sum(row["size"] for row in models.values()),
        "written_today": folder.written(),
        "most_a_day": cache_files.MAX_DAILY,
        "limit": folder.limit,
    }


def table(facts: dict[str, Any], now: float) -> str:
    """The same as a table."""
    rows = [("model", "conversations", "tokens", "size", "last use")]
    for row in facts["models"]:
        ago = duration(max(0, round(now - row["last_used"])))
        name = "".join(c if c.isprintable() else "?" for c in row["model"])
        rows.append(
            (name, str(row["entries"]), str(row["tokens"]), f"{row['size'] / 1e6:.1f} MB", f"{ago} ago")
        )
    rows.append(("total", str(facts["entries"]), "", f"{facts['size'] / 1e6:.1f} MB", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"folder: {facts['folder']}",
            f"written today: {facts['written_today'] / 1e6:.1f} MB of at most {facts['most_a_day'] / 1e6:.0f} MB",
            f"limit: {facts['limit'] / 1e6:.0f} MB (--cache-disk), and a tenth of the free space",
        ]
    )
