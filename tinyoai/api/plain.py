"""The documentation page as plain HTML, for installations without the extra `docs`."""

import json
import re
import shlex
from html import escape
from typing import Any

Json = dict[str, Any]

_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>tinyoai</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/style.css">
</head>
"""


def page(document: Json, base: str, install: str) -> str:
    """Returns the document as a page, with a shell command for each example."""
    info = document["info"]
    parts = [
        _HEAD,
        f'<body><main class="plain">\n<h1>tinyoai</h1>\n<p>Version {escape(info["version"])}. ',
        f"To send requests from this page: <code>{escape(install)}</code>, and restart the server. ",
        'For programs there is <a href="/openapi.json">/openapi.json</a>.</p>\n',
        *(f"<p>{_words(line.removeprefix('* '))}</p>\n" for line in info["description"].splitlines() if line),
    ]
    for tag in document["tags"]:
        parts.append(f"<h2>{escape(tag['name'])}</h2>\n<p>{_words(tag['description'])}</p>\n")
        for path, methods in document["paths"].items():
            parts += [
                _section(document, path, method, base)
                for method, operation in methods.items()
                if tag["name"] in operation["tags"]
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
    """Returns HTML in which `code` is marked up."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def curl(url: str, body: Json) -> str:
    """Returns the shell command of a request."""
    flag = " -N" if body.get("stream") else ""
    sent = shlex.quote(json.dumps(body))
    return f"curl{flag} {url} -H 'Content-Type: application/json' \\\n  -d {sent}"
