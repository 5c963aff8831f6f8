"""Which handler answers which method and path.

Owns the table of routes. `/v1/x` and `/x` are the same route, a trailing slash is tolerated, HEAD is
served by GET's handler, a literal route wins over a pattern. Pure: it calls no handler and must not
know what handlers do.
"""

import re
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes

from tinyoai import errors

if TYPE_CHECKING:
    from tinyoai.web.exchange import Exchange

Handler = Callable[["Exchange"], Awaitable[None]]

_PREFIX = "/v1"
_PATTERN = re.compile(r"^(?P<head>/.*/)\{(?P<name>\w+):path\}$")


class Router:
    """Routes by path, then by method."""

    def __init__(self) -> None:
        self._literal: dict[str, dict[str, Handler]] = {}
        self._patterns: list[tuple[str, str, dict[str, Handler]]] = []

    def add(self, method: str, path: str, handler: Handler) -> None:
        """A path such as /v1/models, or with a last part that takes the rest: /v1/models/{id:path}."""
        path = _bare(path)
        found = _PATTERN.match(path)
        if found is None:
            self._literal.setdefault(path, {})[method] = handler
            return
        for head, name, methods in self._patterns:
            if (head, name) == (found["head"], found["name"]):
                methods[method] = handler
                return
        self._patterns.append((found["head"], found["name"], {method: handler}))

    @property
    def routes(self) -> list[tuple[str, str]]:
        """Every method and path, as they were added but without /v1."""
        named = [(f"{head}{{{name}:path}}", methods) for head, name, methods in self._patterns]
        return [(method, path) for path, methods in [*self._literal.items(), *named] for method in methods]

    def resolve(self, method: str, target: bytes) -> tuple[Handler, dict[str, str], str]:
        """The handler, the path's parameters and the route. Raises NotFound, MethodNotAllowed or BadRequest."""
        path = _bare(_decoded(target))
        methods, params, route = self._find(path)
        if methods is None:
            raise errors.NotFound(f"there is no {path[:200]} here; /docs has all the endpoints")
        handler = methods.get("GET" if method == "HEAD" else method)
        if handler is None:
            allowed = sorted(methods) + (["HEAD"] if "GET" in methods else []) + ["OPTIONS"]
            raise errors.MethodNotAllowed(
                f"{method[:20]} is not allowed on {path[:200]}; use {' or '.join(sorted(methods))}",
                headers={"allow": ", ".join(allowed)},
            )
        return handler, params, route

    def _find(self, path: str) -> tuple[dict[str, Handler] | None, dict[str, str], str]:
        methods = self._literal.get(path)
        if methods is not None:
            return methods, {}, path
        for head, name, methods in self._patterns:
            rest = path[len(head) :]
            if path.startswith(head) and rest:
                return methods, {name: rest}, f"{head}{{{name}}}"
        return None, {}, ""


def _decoded(target: bytes) -> str:
    """The path without its query, percent-escapes decoded once."""
    raw = target.partition(b"?")[0]
    if re.search(rb"%(?![0-9A-Fa-f]{2})", raw):
        raise errors.BadRequest("the path has a broken percent-escape")
    try:
        path = unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise errors.BadRequest("the path is not UTF-8") from None
    if not path.isprintable():
        raise errors.BadRequest("the path holds control characters")
    if any(part in ("..", ".") for part in path.split("/")):
        raise errors.NotFound("there is nothing above or beside the paths here")
    return path


def _bare(path: str) -> str:
    """Without /v1 before it and slashes after it."""
    if path.startswith(_PREFIX + "/"):
        path = path[len(_PREFIX) :]
    return path.rstrip("/") or "/"
