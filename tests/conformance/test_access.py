"""Keys, rates, the queue and deadlines, as clients meet them on a real server."""

import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import openai
import pytest

from tests.serving import Reply, Server, environment, serve

SLOW = '!{"text": "x", "repeat": 100, "step_ms": 10}'
"""A second's work."""


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Asks for a key; everyone has few requests."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("sk-ann Ann\nsk-ben Ben\n")
    path.chmod(0o600)
    with serve(
        "--engine", "fake", "--api-key-file", str(path), "--rate-limit", "12,2000", "--cors-origin", "https://app.example",
        env=environment(TINYOAI_API_KEY="sk-env,sk-more"),
    ) as server:  # fmt: skip
        yield server


def client(server: Server, key: str, **more: Any) -> openai.OpenAI:
    """The SDK, told not to retry."""
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0, **more)


def chat(server: Server, key: str, text: str = "hello", **fields: Any) -> Reply:
    """One chat with a key."""
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}
    return server.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})


def test_the_sdk_raises_what_it_should(keyed: Server) -> None:
    with client(keyed, "wrong") as sdk, pytest.raises(openai.AuthenticationError) as caught:
        sdk.models.list()
    assert caught.value.code == "invalid_api_key"
    with client(keyed, "sk-env") as sdk:
        assert [model.id for model in sdk.models.list()] == ["fake"]


@pytest.mark.rule(23)
def test_every_door_asks_for_the_key_but_health(keyed: Server) -> None:
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/nowhere"),
        ("POST", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
    ):
        reply = keyed.request(method, path)
        assert reply.status == 401, path
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.error["type"] == "authentication_error"
    assert keyed.get("/health").status == 200
    assert keyed.request("GET", "/v1/models", headers={"x-api-key": "sk-more"}).status == 200


@pytest.mark.rule(21)
def test_rates_by_key(keyed: Server) -> None:
    replies = [chat(keyed, "sk-ann") for _ in range(14)]
    good = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status == 429]
    assert len(good) + len(refused) == 14
    assert len(good) in (12, 13)
    assert [reply.headers["x-ratelimit-remaining"] for reply in good][:3] == ["11", "10", "9"]
    for reply in replies:
        assert reply.headers["x-ratelimit-limit"] == reply.headers["x-ratelimit-limit-requests"] == "12"
        assert abs(int(reply.headers["x-ratelimit-reset"]) - time.time()) < 62
    assert refused[0].error["type"] == "rate_limit_error"
    assert refused[0].error["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused[0].headers["retry-after"]) <= 5
    assert chat(keyed, "sk-ben").status == 200
    with client(keyed, "sk-ann") as sdk, pytest.raises(openai.RateLimitError):
        sdk.models.list()


def test_tokens_are_counted(keyed: Server) -> None:
    before = int(
        keyed.request("GET", "/v1/models", headers={"x-api-key": "sk-ben"}).headers[
            "x-ratelimit-remaining-tokens"
        ]
    )
    body = {"stream": True, "stream_options": {"include_usage": True}}
    used = chat(keyed, "sk-ben", '!{"text": "abc", "repeat": 100}', **body).events[-2]["usage"][
        "total_tokens"
    ]
    after = int(
        keyed.request("GET", "/v1/models", headers={"x-api-key": "sk-ben"}).headers[
            "x-ratelimit-remaining-tokens"
        ]
    )
    assert used > 300
    # the bucket fills by 33 a second meanwhile
    assert before - used <= after <= before - used + 600


@pytest.mark.parametrize("n_read", [0, 300])
def test_the_tokens_of_a_stream_are_charged_though_its_reader_left(n_read: int) -> None:
    text = "!" + json.dumps({"text": "x", "repeat": 3000 if n_read else 300, "step_ms": 1})
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "stream": True}
    with serve("--engine", "fake", "--rate-limit", ",300") as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        if n_read:  # events of two lines
            lines = [answer.readline() for _ in range(2 * n_read)]
            assert all(line == b"\n" or line.startswith(b"data: {") for line in lines)
        else:
            assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        deadline = time.monotonic() + 10
        while (status := server.request("GET", "/v1/models").status) == 200 and time.monotonic() < deadline:
            time.sleep(0.05)  # the server has yet to see that the reader left
        assert status == 429


@pytest.mark.rule(24)
def test_pages_of_an_allowed_origin(keyed: Server) -> None:
    origin = {"Origin": "https://app.example"}
    asked = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    reply = keyed.request("OPTIONS", "/v1/chat/completions", headers=asked)
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    assert reply.headers["access-control-allow-headers"] == "authorization"
    answered = keyed.request("GET", "/v1/models", headers={**origin, "x-api-key": "sk-env"})
    assert answered.headers["access-control-allow-origin"] == "https://app.example"
    for name in ("x-ratelimit-remaining", "retry-after", "x-request-id"):
        assert name in answered.headers["access-control-expose-headers"]
    assert (
        "access-control-allow-origin"
        not in keyed.request(
            "OPTIONS", "/v1/models", headers={**asked, "Origin": "https://evil.example"}
        ).headers
    )


def test_a_key_is_never_logged() -> None:
    with serve("--engine", "fake", "--log-level", "debug", "--api-key", "sk-very-secret") as server:
        assert chat(server, "sk-very-secret").status == 200
        assert chat(server, "sk-other-secret").status == 401
        server.stop()
        assert server.process.stderr is not None
        said = server.process.stderr.read()
    assert "/v1/chat/completions" in said
    assert "secret" not in said
    assert "secret" not in server.banner
    assert "Bearer YOUR_KEY" in server.banner


def test_an_open_door_is_told_about() -> None:
    with serve("--engine", "fake", "--host", "0.0.0.0") as server:
        server.stop()
        assert server.process.stderr is not None
        assert "ANYONE" in server.process.stderr.read()
    with serve("--engine", "fake", "--host", "0.0.0.0", "--api-key", "k") as server:
        server.stop()
        assert server.process.stderr is not None
        assert "ANYONE" not in server.process.stderr.read()


# -- the queue -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """One slot, two places in the line, and keys to tell clients apart."""
    flags = ("--parallel", "1", "--max-queue", "2", "--queue-timeout", "1.5", "--api-key", "a,b,c")
    with serve("--engine", "fake", *flags) as server:
        yield server


class Asked(threading.Thread):
    """A chat under way, and when it was answered."""

    def __init__(self, server: Server, key: str, text: str, **fields: Any) -> None:
        super().__init__(daemon=True)
        self._server, self._key, self._text, self._fields = server, key, text, fields
        self.reply: Reply
        self.at = 0.0
        self.start()

    def run(self) -> None:
        self.reply = chat(self._server, self._key, self._text, **self._fields)
        self.at = time.monotonic()

    def wait(self) -> Reply:
        """The answer."""
        self.join(30)
        return self.reply


def test_a_full_queue_says_when_to_come_back(narrow: Server) -> None:
    asked = []
    for _ in range(5):
        asked.append(Asked(narrow, "a", SLOW))
        time.sleep(0.1)
    replies = [one.wait() for one in asked]
    statuses = [reply.status for reply in replies]
    assert statuses[:2] == [200, 200]
    assert statuses[3:] == [429, 429]
    refused = replies[3]
    assert refused.error["code"] == "queue_full"
    assert int(refused.headers["retry-after"]) >= 1
    assert "try again" in refused.error["message"]
    assert float(replies[0].headers["x-queue-ms"]) < 200
    assert float(replies[1].headers["x-queue-ms"]) > 400
    # the third waited for two, which is longer than it may
    assert statuses[2] == 408
    assert replies[2].error["type"] == "timeout_error"
    assert replies[2].error["code"] == "queue_timeout"


def test_clients_take_turns(narrow: Server) -> None:
    short = '!{"text": "x", "repeat": 30, "step_ms": 10}'
    first = Asked(narrow, "a", short)
    time.sleep(0.1)
    second = Asked(narrow, "a", short)
    time.sleep(0.05)
    other = Asked(narrow, "b", short)
    assert {one.wait().status for one in (first, second, other)} == {200}
    third = Asked(narrow, "c", short)
    time.sleep(0.1)
    again = [Asked(narrow, "c", short)]
    time.sleep(0.05)
    again.append(Asked(narrow, "a", short))
    assert third.wait().status == 200
    # c was served last, so a, which came later, is before it
    assert [one.wait().status for one in again] == [200, 200]


def test_many_parts_are_one_request(narrow: Server) -> None:
    body = {"model": "fake", "prompt": [f'!{{"text": "{i}"}}\n' for i in range(100)], "max_tokens": 5}
    reply = narrow.request("POST", "/v1/completions", body, {"x-api-key": "a"})
    assert reply.status == 200
    assert [choice["text"] for choice in reply.json["choices"]] == [str(i) for i in range(100)]


def test_requests_that_call_themselves_alike_are_many(narrow: Server) -> None:
    replies: list[Reply] = []

    def ask(path: str, **fields: Any) -> None:
        headers = {"x-api-key": "a", "x-request-id": "the-same"}
        replies.append(narrow.request("POST", path, {"model": "fake", **fields}, headers))

    first = Asked(narrow, "a", SLOW)
    time.sleep(0.2)
    chats = [("/v1/chat/completions", {"messages": [{"role": "user", "content": SLOW}]})] * 4
    asked = [
        threading.Thread(target=ask, args=(path,), kwargs=fields)
        for path, fields in [*chats, *[("/v1/embeddings", {"input": "x"})] * 4]
    ]
    for thread in asked:
        thread.start()
    for thread in asked:
        thread.join(30)
    assert first.wait().status == 200
    assert [reply.status for reply in replies].count(429) == 6, "the line holds two"


@pytest.mark.rule(27)
def test_who_left_the_queue_never_runs(narrow: Server) -> None:
    first = Asked(narrow, "a", SLOW)
    time.sleep(0.2)
    body = b'{"model": "fake", "messages": [{"role": "user", "content": "!{\\"kill_at\\": 0}"}]}'
    with narrow.connect() as sock:
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: b\r\n"
            + b"Content-Length: %d\r\n\r\n" % len(body)
            + body
        )
        time.sleep(0.2)
    assert first.wait().status == 200
    assert chat(narrow, "a").status == 200  # nothing has killed the worker


# -- deadlines -------------------------------------------------------------------------------------------


@pytest.mark.rule(22)
@pytest.mark.parametrize("header", ["x-stainless-read-timeout", "X-Stainless-Timeout"])
def test_an_answer_is_cut_before_its_client_stops_listening(fake: Server, header: str) -> None:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": '!{"text": "x", "repeat": 3000, "step_ms": 5}'}],
    }
    reply = fake.request("POST", "/v1/chat/completions", body, {header: "1.5"}, timeout=10)
    choice = reply.json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert 10 < len(choice["message"]["content"]) < 3000
    assert reply.json["usage"]["completion_tokens"] > 10


def test_the_sdk_gets_what_there_is(fake: Server) -> None:
    with client(fake, "any", timeout=1.5) as sdk:
        got = sdk.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": '!{"text": "x", "repeat": 3000, "step_ms": 5}'}],
        )
    assert got.choices[0].finish_reason == "length"


def test_a_long_prompt_is_cut_in_its_middle(fake: Server) -> None:
    text = '!{"text": "x", "prefill_ms": 100}' + " " * 3000
    body = {"model": "fake", "messages": [{"role": "user", "content": text}]}
    reply = fake.request(
        "POST", "/v1/chat/completions", body, {"x-stainless-read-timeout": "1.2"}, timeout=60
    )
    assert reply.status == 200


def test_a_stream_has_no_deadline(fake: Server) -> None:
    body = {
        "model": "fake",
        "stream": True,
        "messages": [{"role": "user", "content": '!{"text": "x", "repeat": 200, "step_ms": 5}'}],
    }
    reply = fake.request("POST", "/v1/chat/completions", body, {"x-stainless-read-timeout": "0.6"})
    assert reply.events[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "0", "x", "1e999", "600"])
def test_an_odd_limit_is_none(fake: Server, limit: str) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    reply = fake.request("POST", "/v1/chat/completions", body, {"x-stainless-read-timeout": limit})
    assert reply.json["choices"][0]["finish_reason"] == "stop"


def test_request_ids(fake: Server) -> None:
    for given, kept in (("trace-1.a_B", True), ("x" * 129, False), ("a b", False), ("", False)):
        for path in ("/v1/models", "/nowhere"):
            got = fake.request("GET", path, headers={"X-Request-ID": given}).headers["x-request-id"]
            assert (got == given) is kept
            assert got
