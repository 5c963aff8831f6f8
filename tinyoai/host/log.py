"""Log lines: to stderr, one line each, safe to print.

Owns the format. Whatever a client sent and however it was logged, a line holds no control
characters and has a bounded length, so nobody can forge a line or move a terminal's cursor. No
prompt and no answer is logged. It must not know what is logged.
"""

import logging
import sys

MAX_LINE = 2000
"""Characters of a message; a traceback may follow it."""


class Formatter(logging.Formatter):
    """`2026-01-31 12:00:00 INFO tinyoai.web: message`, escaped and cut."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        return clean(super().formatMessage(record))


def clean(text: str) -> str:
    """Control characters escaped, and no longer than MAX_LINE."""
    if len(text) > MAX_LINE:
        text = text[:MAX_LINE] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def setup(level: str) -> None:
    """Sends this project's log to stderr. A full disk or a closed pipe there loses lines, nothing else."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    logger = logging.getLogger("tinyoai")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    logging.raiseExceptions = False
