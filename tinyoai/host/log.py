"""Log lines on stderr.

Control characters are escaped and the length is bounded, so that a client cannot forge a line or move a terminal's
cursor. Prompts and answers are never logged.
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
    """The text with control characters escaped, cut after MAX_LINE characters."""
    if len(text) > MAX_LINE:
        text = text[:MAX_LINE] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def setup(level: str) -> None:
    """Sends the log of this package to stderr. Lines that cannot be written are dropped."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter())
    logger = logging.getLogger("tinyoai")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
    logging.raiseExceptions = False
