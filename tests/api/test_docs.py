"""The docs page: in a real browser, without the `docs` extra, and with requests for other paths."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import INSTALL, Page, browser, executable
from tests.serving import Server, environment, serve
from tinyoai.api import docs, plain
from tinyoai.api.examples import bodies
from tinyoai.api.routes import ROUTES

CHAT = "#operations-Answers-createChatCompletion"
LIVE = f"{CHAT} .live-responses-table"

needs_chromium = pytest.mark.skipif(executable() is None, reason=f"no Chromium: {INSTALL}")


def opened(page: Page, server: Server) -> None:
    """Opens the page, unfolds the chat endpoint and waits for its first example."""
    page.open(f"http://127.0.0.1:{server.port}/docs")
    page.press(f"{CHAT} .opblock-summary-control")
    page.wait(f"document.querySelector('{CHAT} textarea')?.value.includes('France')")


def pick(page: Page, title: str) -> None:
    """Selects another example."""
    chosen = f"document.querySelector('{CHAT} .examples-select-element')"
    page.run(f"{chosen}.value = '{title}'; {chosen}.dispatchEvent(new Event('change', {{bubbles: true}}))")


@needs_chromium
def test_try_it_out_shows_an_answer_without_foreign_requests(builtin: Server, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        opened(page, builtin)
        page.press(f"{CHAT} .execute")
        page.wait(f"document.querySelector('{LIVE}')?.textContent.includes('Paris')")
        assert page.run(
            f"document.querySelector('{LIVE} .response .response-col_status').textContent"
        ).startswith("200")
        page.run(f"document.querySelector('{CHAT} .execute').scrollIntoView()")
        page.picture(tmp_path / "answer.png")
        own = (f"http://127.0.0.1:{builtin.port}/", "data:")
        assert [url for url in page.requests if not url.startswith(own)] == []
        assert page.messages == []
    assert (tmp_path / "answer.png").stat().st_size > 10_000


@needs_chromium
def test_a_stream_is_shown_as_it_arrives(fake: Server, tmp_path: Path) -> None:
    script = '!{"text": "tick ", "repeat": 150, "step_ms": 10}'
    with browser(tmp_path / "profile") as page:
        opened(page, fake)
        pick(page, "Streaming")
        area = f"document.querySelector('{CHAT} textarea')"
        page.wait(f"{area}?.value.includes('stream')")
        page.run(
            f"(() => {{ const body = JSON.parse({area}.value); body.messages[0].content = {script!r};"
            f" Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set.call({area},"
            f" JSON.stringify(body)); {area}.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
        )
        page.press(f"{CHAT} .execute")
        shown = page.wait("document.querySelector('#live pre').textContent.match(/^tick tick .*/)?.[0]")
        assert len(shown) < 5 * 150, "the stream was shown only when it was complete"
        assert page.run("document.querySelector('#live b').textContent") == "The answer, as it comes"
        page.wait(f"document.querySelector('{LIVE}')?.textContent.includes('[DONE]')")
        page.wait("document.querySelector('#live b').textContent === 'The whole answer'")
        assert page.run("document.querySelector('#live pre').textContent") == "tick " * 150
        page.picture(tmp_path / "stream.png")
        page.press("#live button")
        page.wait("document.querySelector('#live').hidden")
        assert page.messages == []


@needs_chromium
def test_an_error_message_is_shown_unchanged(fake: Server, tmp_path: Path) -> None:
    with browser(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{fake.port}/docs")
        one = "#operations-Models-retrieveModel"
        page.press(f"{one} .opblock-summary-control")
        page.wait(f"document.querySelector('{one} input')?.value === 'fake'")
        page.press(f"{one} .execute")
        page.wait(f"document.querySelector('{one} .live-responses-table')?.textContent.includes('owned_by')")


@needs_chromium
def test_with_keys_the_page_needs_none_but_requests_do(tmp_path: Path) -> None:
    with (
        serve("--engine", "fake", env=environment(TINYOAI_API_KEY="sesame")) as server,
        browser(tmp_path / "profile") as page,
    ):
        opened(page, server)
        page.press(f"{CHAT} .execute")
        page.wait(f"document.querySelector('{LIVE}')?.textContent.includes('invalid_api_key')")
        page.run("window.ui.preauthorizeApiKey('bearer', 'sesame')")
        page.press(f"{CHAT} .execute")
        page.wait(f"document.querySelector('{LIVE}')?.textContent.includes('chat.completion')")


def test_the_banner_shows_the_address_of_the_page(fake: Server) -> None:
    assert f"http://127.0.0.1:{fake.port}/docs\n" in fake.banner


@pytest.mark.parametrize("path", ["/", "/v1/"])
def test_the_root_redirects_to_the_page(fake: Server, path: str) -> None:
    reply = fake.get(path)
    assert reply.status == 302
    assert fake.get(path + reply.headers["location"]).headers["content-type"].startswith("text/html")


def test_headers_block_all_other_sources(fake: Server) -> None:
    page = fake.get("/docs")
    assert page.status == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "http" not in policy
    assert "unsafe-eval" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert b"<script>" not in page.body
    assert b"://" not in page.body


@pytest.mark.parametrize(
    ("name", "kind", "kept"),
    [
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8", "immutable"),
        ("swagger-ui.css", "text/css; charset=utf-8", "immutable"),
        ("favicon-32x32.png", "image/png", "immutable"),
        ("start.js", "text/javascript; charset=utf-8", "no-cache"),
        ("style.css", "text/css; charset=utf-8", "no-cache"),
    ],
)
def test_files(fake: Server, name: str, kind: str, kept: str) -> None:
    reply = fake.get(f"/docs/{name}?1")
    assert (reply.status, reply.headers["content-type"]) == (200, kind)
    assert kept in reply.headers["cache-control"]
    assert len(reply.body) > 500
    assert fake.request("HEAD", f"/docs/{name}").headers["content-length"] == str(len(reply.body))


@pytest.mark.parametrize(
    "path",
    [
        "../docs.py",
        "%2e%2e/docs.py",
        "..%2fdocs.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "index.html",
        "swagger-ui.css/",
        "x",
    ],
)
def test_only_the_pages_files_are_served(fake: Server, path: str) -> None:
    reply = fake.get(f"/docs/{path}")
    if path == "swagger-ui.css/":  # a trailing slash is tolerated everywhere
        assert (reply.status, reply.headers["content-type"]) == (200, "text/css; charset=utf-8")
    else:
        assert (reply.status, reply.error["type"]) == (404, "not_found_error")


def test_without_the_extra_it_is_a_plain_page(tmp_path: Path) -> None:
    # an empty module of that name, found first on the path, is a package without the files
    (tmp_path / "openapi_ui_bundles.py").write_text("")
    with serve("--engine", "fake", env=environment(PYTHONPATH=str(tmp_path))) as server:
        page = server.get("/docs")
        assert page.status == 200
        html = page.body.decode()
        assert docs.INSTALL.replace("'", "&#x27;") in html
        for route in ROUTES:
            assert not route.tag or route.path.replace(":path}", "}") in html
        assert f"curl -N http://127.0.0.1:{server.port}/v1/chat/completions" in html
        assert "<script" not in html
        assert server.get("/docs/swagger-ui.css").error["type"] == "not_found_error"
        assert server.get("/docs/style.css").headers["content-type"] == "text/css; charset=utf-8"


def test_its_command_lines_work_as_written(fake: Server) -> None:
    chat = ROUTES[0]
    for body in bodies(chat, "fake").values():
        line = plain.curl(f"http://127.0.0.1:{fake.port}{chat.path}", body)
        done = subprocess.run(["bash", "-c", line], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert b'"choices"' in done.stdout, done.stdout


def test_startup_does_not_import_the_page() -> None:
    late = {
        "openapi_ui_bundles",
        "prometheus_client",
        "tinyoai.api.examples",
        "tinyoai.api.openapi",
        "tinyoai.api.plain",
    }
    script = f"import sys, tinyoai.app; sys.exit(bool({late} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
