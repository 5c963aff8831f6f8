"""Durations and sizes as people write them: "5m", "1h30m", "512M"."""

import re

MAX_SECONDS = 1e9
"""Longer times are cut to this, which is what timers and clocks can hold."""

_TIME = re.compile(
    r"(?:(?P<h>\d+(?:\.\d+)?)h)?(?:(?P<m>\d+(?:\.\d+)?)m)?(?:(?P<s>\d+(?:\.\d+)?)s?)?", re.ASCII
)
_SIZE = re.compile(r"(?P<n>\d{1,15}(?:\.\d{1,9})?)\s*(?P<unit>[kmgt]?)(?P<i>i?)b?", re.ASCII | re.IGNORECASE)


def seconds(text: str) -> float:
    """Seconds of a time such as "300", "90s", "5m" or "1h30m"; -1 (no limit) for anything that begins with a minus.

    Raises ValueError with the expected form.
    """
    text = text.strip().lower()
    found = _TIME.fullmatch(text.removeprefix("-"))
    if found is None or not any(found.groups()):
        raise ValueError("expected seconds, or a time such as 90s, 5m or 1h30m; -1 means no limit")
    if text.startswith("-"):
        return -1.0
    whole = 3600 * float(found["h"] or 0) + 60 * float(found["m"] or 0) + float(found["s"] or 0)
    return min(whole, MAX_SECONDS)


def size(text: str) -> int:
    """Bytes of "4000000000", "4G" or "512M": K, M, G and T are powers of 1024. Raises ValueError."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError("expected bytes, or a size such as 512M or 4G")
    return int(float(found["n"]) * 1024 ** " kmgt".index(found["unit"].lower() or " "))
