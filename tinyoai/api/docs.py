"""GET /openapi.json and /docs: the description of this server, to read and to try out without network access.

With the extra `docs` the page is Swagger UI, from the files of an installed package that is never imported; without
it the page is plain HTML made from the same document. Files come from a table of names, so no path of a client
reaches the file system.
"""

import asyncio
import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tinyoai import errors
from tinyoai.api import decode
from tinyoai.web.exchange import Exchange

INSTALL = "pip install 'tinyoai[docs]'"

_HERE = Path(__file__).parent / "page"
_PACKAGE = "openapi_ui_bundles"

_OWN = {"style.css": "text/css; charset=utf-8", "start.js": "text/javascript; charset=utf-8"}
_FOREIGN = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "favicon-32x32.png": "image/png",
}
"""Files of the page by name, with their types."""

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing from other origins. Swagger UI sets styles on elements and has its images in its style sheet."""

_HEADERS = [
    ("content-security-policy", _POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
]


_HOST = re.compile(r"[\w.\-]+(:\d+)?|\[[\da-fA-F:.]+\](:\d+)?", re.ASCII)


@cache
def _vendor() -> Path | None:
    """Returns the folder of Swagger UI's files; None if they are not installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / "swagger_ui" / "vendor"
        if all((folder / name).is_file() for name in _FOREIGN):
            return folder
    return None


class Docs:
    """The endpoints. `model` returns the id of the model in the examples."""

    def __init__(self, model: Callable[[], str]) -> None:
        self._model = model
        self._made: tuple[str, bytes] = ("", b"")

    async def openapi(self, exchange: Exchange) -> None:
        """Answers with the OpenAPI document."""
        name = self._model()
        if self._made[0] != name:
            self._made = (name, decode.encode(_described(name)))
        exchange.respond(200, self._made[1], headers=[("cache-control", "no-cache")])

    async def page(self, exchange: Exchange) -> None:
        """Answers with the page."""
        vendor = _vendor()
        if vendor is not None:
            version = f"{(vendor / 'swagger-ui-bundle.js').stat().st_mtime_ns:x}"
            html = (_HERE / "interactive.html").read_text().replace("VERSION", version)
        else:
            from tinyoai.api import plain  # rarely needed

            html = plain.page(_described(self._model()), _base(exchange), INSTALL)
        headers = [*_HEADERS, ("cache-control", "no-cache")]
        exchange.respond(200, html.encode(), content_type="text/html; charset=utf-8", headers=headers)

    async def home(self, exchange: Exchange) -> None:
        """Redirects browsers to the page. HEAD is a probe of some clients, which expect a 200."""
        if exchange.method == "HEAD":
            exchange.respond(200, b"", content_type="text/html; charset=utf-8")
        else:
            exchange.respond(302, b"", headers=[("location", "docs")])

    async def file(self, exchange: Exchange) -> None:
        """Answers with a file of the page. Raises errors.NotFound."""
        name = exchange.route_params["name"]
        vendor = _vendor()
        if name in _OWN:
            path, kind, keep = _HERE / name, _OWN[name], "no-cache"
        elif name in _FOREIGN and vendor is not None:
            # the page's links have the version, so browsers may cache it
            path, kind, keep = vendor / name, _FOREIGN[name], "public, max-age=31536000, immutable"
        else:
            raise errors.NotFound(f"file {name[:100]!r} not found in /docs")
        body = await asyncio.to_thread(path.read_bytes)
        exchange.respond(200, body, content_type=kind, headers=[*_HEADERS, ("cache-control", keep)])


def _described(model: str) -> dict[str, Any]:
    from tinyoai.api import openapi  # most servers never need it

    return openapi.document(model)


def _base(exchange: Exchange) -> str:
    """Returns this server's address as the client wrote it."""
    host = (exchange.head.get(b"host") or b"").decode("latin-1")
    return f"http://{host}" if _HOST.fullmatch(host) else "http://127.0.0.1:8000"
