"""The table of routes: which handler serves which method and path.

A trailing slash is tolerated, HEAD is served by GET's handler, and a literal route wins over a pattern.
"""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote_to_bytes

from tinyoai import errors

if TYPE_CHECKING:
    from tinyoai.web.exchange import Exchange

Handler = Callable[["Exchange"], Awaitable[None]]

_PATTERN = re.compile(r"^(?P<head>/.*/)\{(?P<name>\w+):path\}$")


class _Route(NamedTuple):
    handler: Handler
    local_pages: bool


_Methods = dict[str, _Route]


class Match(NamedTuple):
    """What a request's method and path lead to."""

    handler: Handler
    params: dict[str, str]
    """The path's parameters."""
    route: str
    """The path as it was added, without a prefix."""
    local_pages: bool
    """Web pages from loopback origins may use it."""


class Router:
    """Finds routes by path, then by method."""

    def __init__(self, *, prefixes: Sequence[str] = (), help_path: str = "") -> None:
        """Each route is also found behind each of the prefixes, such as /v1.

        Messages for unknown paths point to the help path.
        """
        self._prefixes = tuple(prefixes)
        self._hint = f"; {help_path} lists all endpoints" if help_path else ""
        self._literal: dict[str, _Methods] = {}
        self._patterns: list[tuple[str, str, _Methods]] = []

    def add(self, method: str, path: str, handler: Handler, local_pages: bool = False) -> None:
        """Adds a path such as /models, or one whose last part takes the rest: /models/{id:path}.

        `local_pages`: on a loopback bind, web pages from loopback origins may use the route.
        """
        route = _Route(handler, local_pages)
        path = self._bare(path)
        found = _PATTERN.match(path)
        if found is None:
            self._literal.setdefault(path, {})[method] = route
            return
        for head, name, methods in self._patterns:
            if (head, name) == (found["head"], found["name"]):
                methods[method] = route
                return
        self._patterns.append((found["head"], found["name"], {method: route}))

    @property
    def routes(self) -> list[tuple[str, str]]:
        """Every method and path, as added but without a prefix."""
        named = [(f"{head}{{{name}:path}}", methods) for head, name, methods in self._patterns]
        return [(method, path) for path, methods in [*self._literal.items(), *named] for method in methods]

    def resolve(self, method: str, target: bytes) -> Match:
        """Returns what serves a request. Raises errors.NotFound, MethodNotAllowed or BadRequest."""
        path = self._bare(_decoded(target))
        methods, params, name = self._find(path)
        if methods is None:
            raise errors.NotFound(f"path {path[:200]} not found{self._hint}")
        route = methods.get("GET" if method == "HEAD" else method)
        if route is None:
            allowed = sorted(methods) + (["HEAD"] if "GET" in methods else []) + ["OPTIONS"]
            raise errors.MethodNotAllowed(
                f"method {method[:20]} is not allowed for {path[:200]}; use {' or '.join(sorted(methods))}",
                headers={"allow": ", ".join(allowed)},
            )
        return Match(route.handler, params, name, route.local_pages)

    def _find(self, path: str) -> tuple[_Methods | None, dict[str, str], str]:
        methods = self._literal.get(path)
        if methods is not None:
            return methods, {}, path
        for head, name, methods in self._patterns:
            rest = path[len(head) :]
            if path.startswith(head) and rest:
                return methods, {name: rest}, f"{head}{{{name}}}"
        return None, {}, ""

    def _bare(self, path: str) -> str:
        """Returns the path without a prefix and without trailing slashes."""
        for prefix in self._prefixes:
            if path.startswith(prefix + "/"):
                path = path[len(prefix) :]
                break
        return path.rstrip("/") or "/"


def _decoded(target: bytes) -> str:
    """Returns the path without its query, percent-escapes decoded once."""
    raw = target.partition(b"?")[0]
    if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
        raise errors.BadRequest("the path contains a broken percent-escape")
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise errors.BadRequest("the path is not UTF-8") from None
    if not path.isprintable():
        raise errors.BadRequest("the path contains control characters")
    if any(part in ("..", ".") for part in path.split("/")):
        raise errors.NotFound("paths with . or .. parts do not exist")
    return path
