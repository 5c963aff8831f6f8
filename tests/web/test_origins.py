"""Origins: equality, and pages of this machine."""

import pytest

from tinyoai.web.origins import is_loopback_page, normalized


@pytest.mark.parametrize(
    ("origin", "same"),
    [
        ("https://App.example", "https://app.example"),
        ("https://app.example/", "https://app.example"),
        ("https://app.example:443", "https://app.example"),
        ("http://app.example:80/", "http://app.example"),
        ("http://app.example:8080", "http://app.example:8080"),
        ("https://app.example:80", "https://app.example:80"),
        ("chrome-extension://ABCDEF/", "chrome-extension://abcdef"),
        ("moz-extension://2d3e-4f", "moz-extension://2d3e-4f"),
        ("vscode-webview://1a2b", "vscode-webview://1a2b"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("app://", "app://"),
        ("null", "null"),
        ("*", "*"),
    ],
)
def test_equal_origins(origin: str, same: str) -> None:
    assert normalized(origin) == same


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:3000",
        "https://localhost:3000",
        "HTTP://LOCALHOST:1",
        "http://app.localhost:5173",
        "http://127.0.0.1:8080",
        "http://127.8.9.10",
        "http://[::1]:3000",
        "https://[::1]",
    ],
)
def test_pages_of_this_machine(origin: str) -> None:
    assert is_loopback_page(origin)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "*",
        "file://",
        "http://",
        "http://evil.example",
        "http://localhost.evil.example",
        "http://127.0.0.1.evil.example",
        "http://evil.example:127",
        "http://localhost@evil.example",
        "http://localhost:80@evil.example",
        "http://localhost:3000/path",
        "http://localhost ",
        "http://localhost\n",
        "http://evil.example#localhost",
        "http://notlocalhost",
        "http://192.168.1.5",
        "http://0.0.0.0",
        "http://[::]",
        "http://[::2]",
        "http://::1",
        "http://[localhost",
        "http://128.0.0.1",
        "http://127.0.0.256",
        "ftp://localhost",
        "chrome-extension://localhost",
        "app://localhost",
        "localhost:3000",
        "http://localhost:3000, http://evil.example",
    ],
)
def test_other_origins(origin: str) -> None:
    assert not is_loopback_page(origin)
