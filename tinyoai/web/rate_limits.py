"""Rate limits of each client: token buckets of requests and of a model's tokens, and their headers.

A bucket holds one minute's allowance and fills steadily. The cost in tokens is known only after the
response, so it is charged then, and a bucket of tokens may be overdrawn.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from tinyoai.errors import RateLimited, UsageError

MAX_CLIENTS = 10_000
"""Clients remembered. Beyond that the least recently seen is forgotten, and restarts with full buckets."""


class Rate(NamedTuple):
    """Allowances per minute; 0 means no limit."""

    requests: int = 0
    tokens: int = 0


def parse(text: str) -> Rate:
    """Reads `60`, `60,20000` or `,20000`: requests and tokens per minute. Raises UsageError."""
    numbers = [part.strip() for part in text.split(",")] if text else []
    if len(numbers) > 2 or any(
        n and not (n.isascii() and n.isdecimal() and 0 < int(n) < 1 << 40) for n in numbers
    ):
        raise UsageError(
            f"--rate-limit: {text!r} is not a rate; give requests per minute, or requests and tokens: 60,20000"
        )
    values = [int(n) if n else 0 for n in numbers] + [0, 0]
    return Rate(values[0], values[1])


class Bucket:
    """One allowance of one client."""

    __slots__ = ("_at", "_level", "_per_minute")

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Returns the amount left; below 0 if the bucket is overdrawn."""
        passed = max(0.0, now - self._at)
        self._at = max(self._at, now)
        self._level = min(self._per_minute, self._level + passed * self._per_minute / 60.0)
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Takes the amount. Overdraws the bucket if less is left."""
        self._level = self.level(now) - amount

    def until(self, amount: float, now: float) -> float:
        """Returns the seconds until this amount is available."""
        return max(0.0, amount - self.level(now)) * 60.0 / self._per_minute


class _Client(NamedTuple):
    requests: Bucket | None
    tokens: Bucket | None


class Rates:
    """The buckets of all clients. False if nothing is limited."""

    def __init__(self, rate: Rate, clock: Callable[[], float], wall: Callable[[], float]) -> None:
        """`clock` returns monotonic seconds, `wall` returns Unix time."""
        self._rate = rate
        self._clock = clock
        self._wall = wall
        self._clients: OrderedDict[str, _Client] = OrderedDict()

    def __bool__(self) -> bool:
        return any(self._rate)

    def take(self, client: str) -> None:
        """Takes one request. Raises RateLimited with an exact Retry-After if the client has none left."""
        now, buckets = self._clock(), self._find(client)
        waits = [bucket.until(1.0, now) for bucket in buckets if bucket is not None]
        wait = max(waits, default=0.0)
        if wait > 0.0:
            what = (
                "requests" if buckets.requests is not None and buckets.requests.until(1.0, now) else "tokens"
            )
            limit = getattr(self._rate, what)
            raise RateLimited(
                f"Rate limit exceeded: {limit} {what} per minute. Please retry in {wait:.1f} seconds.",
                headers={
                    "retry-after": str(math.ceil(wait)),
                    "retry-after-ms": str(math.ceil(wait * 1000.0)),
                },
            )
        if buckets.requests is not None:
            buckets.requests.take(1.0, now)

    def charge(self, client: str, n_tokens: int) -> None:
        """Takes the tokens of a response."""
        if n_tokens and self._rate.tokens:
            bucket = self._find(client).tokens
            if bucket is not None:
                bucket.take(float(n_tokens), self._clock())

    def headers(self, client: str) -> list[tuple[str, str]]:
        """Returns the client's limits, remainders and reset times, in both common spellings of these headers."""
        now, headers = self._clock(), []
        for what, bucket in zip(Rate._fields, self._find(client), strict=True):
            if bucket is None:
                continue
            limit = getattr(self._rate, what)
            left = str(max(0, math.floor(bucket.level(now))))
            full = bucket.until(float(limit), now)
            if what == "requests" or not self._rate.requests:
                headers += [
                    ("x-ratelimit-limit", str(limit)),
                    ("x-ratelimit-remaining", left),
                    ("x-ratelimit-reset", str(math.ceil(self._wall() + full))),
                ]
            headers += [
                (f"x-ratelimit-limit-{what}", str(limit)),
                (f"x-ratelimit-remaining-{what}", left),
                (f"x-ratelimit-reset-{what}", _duration(full)),
            ]
        return headers

    def _find(self, client: str) -> _Client:
        found = self._clients.get(client)
        if found is not None:
            self._clients.move_to_end(client)
            return found
        now = self._clock()
        made = [Bucket(per_minute, now) if per_minute else None for per_minute in self._rate]
        self._clients[client] = found = _Client(*made)
        if len(self._clients) > MAX_CLIENTS:
            self._clients.popitem(last=False)
        return found


def _duration(seconds: float) -> str:
    """Returns a duration as OpenAI writes it: 6m0s, 1.5s, 20ms."""
    milliseconds = math.ceil(seconds * 1000.0)
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".")
    return f"{minutes}m{text}s" if minutes else f"{text}s"
