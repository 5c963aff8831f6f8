"""GET /docs: the description of this server, to read and to try out, without any network.

Owns the page and its files. With the extra `docs` it is Swagger UI, out of the files of an installed
package (openapi-ui-bundles, which is never imported); without it, a plain page made from the same
document. Files are served from a table of names, so no path of a client ever reaches the file system.
It must not know what the endpoints do.
"""

import asyncio
import importlib.util
import json
import re
import shlex
from functools import cache
from html import escape
from pathlib import Path

from tinyoai import __version__, errors
from tinyoai.api.openapi import OPERATIONS, Json, OpenApi
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
"""The files of each side, with their types."""

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
"""Nothing from elsewhere; Swagger UI sets styles on elements, and its pictures are in its style sheet."""

_HEADERS = [
    ("content-security-policy", _POLICY),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
]


@cache
def _vendor() -> Path | None:
    """Where Swagger UI's files are, if they are installed."""
    spec = importlib.util.find_spec(_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        folder = Path(place) / "swagger_ui" / "vendor"
        if all((folder / name).is_file() for name in _FOREIGN):
            return folder
    return None


class Docs:
    """The page, and the files it is made of."""

    def __init__(self, openapi: OpenApi) -> None:
        self._openapi = openapi

    async def page(self, exchange: Exchange) -> None:
        """The page."""
        html = _INTERACTIVE if _vendor() else _plain(self._openapi.document(), _base(exchange))
        headers = [*_HEADERS, ("cache-control", "no-cache")]
        exchange.respond(200, html.encode(), content_type="text/html; charset=utf-8", headers=headers)

    async def file(self, exchange: Exchange) -> None:
        """One of its files. Raises errors.NotFound."""
        name = exchange.route_params["name"]
        vendor = _vendor()
        if name in _OWN:
            path, kind, keep = _HERE / name, _OWN[name], "no-cache"
        elif name in _FOREIGN and vendor is not None:
            # the page asks for it by version, so it may be kept for ever
            path, kind, keep = vendor / name, _FOREIGN[name], "public, max-age=31536000, immutable"
        else:
            raise errors.NotFound(f"/docs has no file {name[:100]!r}")
        body = await asyncio.to_thread(path.read_bytes)
        exchange.respond(200, body, content_type=kind, headers=[*_HEADERS, ("cache-control", keep)])


_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tinyoai</title>
"""

_INTERACTIVE = f"""\
{_HEAD}<link rel="icon" type="image/png" href="/docs/favicon-32x32.png?{__version__}">
<link rel="stylesheet" href="/docs/swagger-ui.css?{__version__}">
<link rel="stylesheet" href="/docs/style.css">
</head>
<body>
<div id="page"><p class="plain">This page needs JavaScript; without it, <a href="/openapi.json">/openapi.json</a>
has all that it would show.</p></div>
<section id="live" hidden aria-live="polite">
<header><b></b><button type="button" aria-label="Close">&times;</button></header><pre></pre></section>
<script src="/docs/swagger-ui-bundle.js?{__version__}"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""


# -- without the extra -------------------------------------------------------------------------------

_HOST = re.compile(r"[\w.\-]+(:\d+)?|\[[\da-fA-F:.]+\](:\d+)?", re.ASCII)


def _base(exchange: Exchange) -> str:
    """This server's address, as this client calls it."""
    host = (exchange.head.get(b"host") or b"").decode("latin-1")
    return f"http://{host}" if _HOST.fullmatch(host) else "http://127.0.0.1:8000"


def _plain(document: Json, base: str) -> str:
    """The same in plain HTML: what there is, with a line to paste for each."""
    info = document["info"]
    parts = [
        _HEAD,
        '<link rel="icon" href="data:,">\n<link rel="stylesheet" href="/docs/style.css">\n</head>\n',
        f'<body><main class="plain">\n<h1>tinyoai</h1>\n<p>Version {escape(info["version"])}. ',
        f"To try things out on this page: <code>{escape(INSTALL)}</code>, and start the server again. ",
        'For programs there is <a href="/openapi.json">/openapi.json</a>.</p>\n',
        *(f"<p>{_words(line.removeprefix('* '))}</p>\n" for line in info["description"].splitlines() if line),
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2>\n<p>{_words(tag['description'])}</p>\n")
        parts += [
            _section(document, o.path, o.method.lower(), base) for o in OPERATIONS if o.tag == tag["name"]
        ]
    return "".join([*parts, "</main></body>\n</html>\n"])


def _section(document: Json, path: str, method: str, base: str) -> str:
    operation = document["paths"][path][method]
    parts = [
        f"<section><h3><code>{method.upper()} {escape(path)}</code> {_words(operation['summary'])}</h3>\n",
        f"<p>{_words(operation['description'])}</p>\n" if "description" in operation else "",
    ]
    for media in operation.get("requestBody", {}).get("content", {}).values():
        shape = document["components"]["schemas"][media["schema"]["$ref"].rpartition("/")[2]]
        parts.append("<table>\n")
        for field, what in shape["properties"].items():
            needed = " (required)" if field in shape.get("required", ()) else ""
            words = _words(what.get("description", "")) + needed
            parts.append(f"<tr><td><code>{escape(field)}</code></td><td>{words}</td></tr>\n")
        parts.append("</table>\n")
        parts += [
            f"<p>{escape(title)}:</p>\n<pre>{escape(curl(base + path, example['value']))}</pre>\n"
            for title, example in media["examples"].items()
        ]
    return "".join([*parts, "</section>\n"])


def _words(text: str) -> str:
    """Text with its `code` marked as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def curl(url: str, body: Json) -> str:
    """A line to paste into a shell."""
    flag = " -N" if body.get("stream") else ""
    sent = shlex.quote(json.dumps(body))
    return f"curl{flag} {url} -H 'Content-Type: application/json' \\\n  -d {sent}"
