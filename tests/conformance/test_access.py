"""Keys, rate limits, the queue and deadlines, tested on real servers."""

import json
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.serving import Reply, Server, environment, serve, wait_until


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with keys and a low rate limit."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text("sk-ann Ann\nsk-ben Ben\n")
    path.chmod(0o600)
    with serve(
        "--engine", "fake", "--api-key-file", str(path), "--rate-limit", "12,2000", "--cors-origin", "https://app.example",
        env=environment(TINYOAI_API_KEY="sk-env,sk-more"),
    ) as server:  # fmt: skip
        yield server


def chat(server: Server, key: str, text: str = "hello", **fields: Any) -> Reply:
    """Sends one chat request with a key."""
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], **fields}
    return server.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {key}"})


def content(reply: Reply) -> str:
    """Returns the text of a chat's first choice."""
    return str(reply.json["choices"][0]["message"]["content"])


@pytest.mark.rule(23)
def test_every_path_but_health_needs_a_key(keyed: Server) -> None:
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
    assert keyed.get("/health").json["status"] == "ok"
    listed = keyed.request("GET", "/v1/models", headers={"x-api-key": "sk-more"})
    assert [card["id"] for card in listed.json["data"]] == ["fake"]


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
    assert content(chat(keyed, "sk-ben")) == "hello", "one client's rate must not limit another"


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
    # meanwhile the bucket fills by 33 tokens a second
    assert before - used <= after <= before - used + 600


@pytest.mark.parametrize("n_read", [0, 300])
def test_the_tokens_of_a_stream_count_when_its_client_left(n_read: int) -> None:
    text = "!" + json.dumps({"text": "x", "repeat": 3000 if n_read else 300, "step_ms": 1})
    body = {"model": "fake", "messages": [{"role": "user", "content": text}], "stream": True}
    with serve("--engine", "fake", "--rate-limit", ",300") as server:
        connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = connection.getresponse()
        if n_read:  # an event has two lines
            lines = [answer.readline() for _ in range(2 * n_read)]
            assert all(line == b"\n" or line.startswith(b"data: {") for line in lines)
        else:
            assert answer.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        # the server may not have seen yet that the client left
        wait_until(lambda: server.request("GET", "/v1/models").status == 429, "the tokens were not counted")


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
        assert content(chat(server, "sk-very-secret")) == "hello"
        assert chat(server, "sk-other-secret").error["code"] == "invalid_api_key"
        server.stop()
        assert server.process.stderr is not None
        said = server.process.stderr.read()
    assert "/v1/chat/completions" in said
    assert "secret" not in said
    assert "secret" not in server.banner
    assert "Bearer YOUR_KEY" in server.banner


def test_a_server_without_keys_on_every_address_warns() -> None:
    with serve("--engine", "fake", "--host", "0.0.0.0") as server:
        server.stop()
        assert server.process.stderr is not None
        assert "ANYONE" in server.process.stderr.read()
    with serve("--engine", "fake", "--host", "0.0.0.0", "--api-key", "k") as server:
        server.stop()
        assert server.process.stderr is not None
        assert "ANYONE" not in server.process.stderr.read()


# -- the queue ---------------------------------------------------------------------------------------


class Held:
    """A streamed answer that keeps its slot until `release` closes its connection."""

    def __init__(self, server: Server, key: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", server.port, timeout=30)
        script = '!{"text": "x", "repeat": 3500, "step_ms": 20}'
        body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": script}]}
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), {"x-api-key": key})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200
        assert self._answer.readline().startswith(b"data: {")

    def __enter__(self) -> "Held":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Closes the connection, as a client that leaves does."""
        self._answer.close()
        self._connection.close()


class Asked(threading.Thread):
    """Sends a chat request in a thread and appends the text of its answer to `served`."""

    def __init__(
        self, server: Server, key: str, text: str = "hello", served: list[str] | None = None
    ) -> None:
        super().__init__(daemon=True)
        self._server, self._key, self._text = server, key, text
        self._served = served
        self._reply: Reply | None = None
        self.start()

    def run(self) -> None:
        self._reply = chat(self._server, self._key, self._text)
        if self._served is not None:
            self._served.append(content(self._reply))

    def wait(self) -> Reply:
        """Waits for the answer and returns it."""
        self.join(60)
        assert self._reply is not None, "there was no answer"
        return self._reply


def wait_for_queue(server: Server, n: int) -> None:
    """Waits until n requests are in the queue."""
    wait_until(lambda: server.status({"x-api-key": "a"})["queue"] == n, f"there were never {n} in the queue")


@pytest.fixture(scope="module")
def narrow() -> Iterator[Server]:
    """A server with one slot and a queue of three; the keys tell clients apart."""
    with serve("--engine", "fake", "--parallel", "1", "--max-queue", "3", "--api-key", "a,b,c") as server:
        yield server


def test_a_full_queue_has_a_retry_after(narrow: Server) -> None:
    with Held(narrow, "a") as held:
        queued = []
        for n in (1, 2, 3):
            queued.append(Asked(narrow, "a", f"number {n}"))
            wait_for_queue(narrow, n)
        for key in ("a", "b"):
            refused = chat(narrow, key)
            assert (refused.status, refused.error["code"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
            assert "try again" in refused.error["message"]
        held.release()
        replies = [one.wait() for one in queued]
        assert [content(reply) for reply in replies] == ["number 1", "number 2", "number 3"]
        for reply in replies:
            assert float(reply.headers["x-queue-ms"]) > 0


def test_a_request_that_waits_too_long_is_refused() -> None:
    flags = ("--engine", "fake", "--parallel", "1", "--queue-timeout", "0.2")
    with serve(*flags) as server, Held(server, "a") as held:
        refused = server.chat("hello")
        assert (refused.status, refused.error["type"]) == (408, "timeout_error")
        assert refused.error["code"] == "queue_timeout"
        held.release()
        assert server.say("hello") == "hello"


def test_clients_take_turns(narrow: Server) -> None:
    served: list[str] = []
    with Held(narrow, "c") as held:
        asked = []
        for n, (key, name) in enumerate((("a", "a1"), ("a", "a2"), ("b", "b1")), 1):
            # each answer takes long enough that the answers arrive in the order of service
            script = json.dumps({"text": name, "step_ms": 20})
            asked.append(Asked(narrow, key, "!" + script, served))
            wait_for_queue(narrow, n)
        held.release()
        assert [content(one.wait()) for one in asked] == ["a1", "a2", "b1"]
    assert served == ["a1", "b1", "a2"]


def test_many_parts_are_one_request(narrow: Server) -> None:
    body = {"model": "fake", "prompt": [f'!{{"text": "{i}"}}\n' for i in range(100)], "max_tokens": 5}
    reply = narrow.request("POST", "/v1/completions", body, {"x-api-key": "a"})
    assert [choice["text"] for choice in reply.json["choices"]] == [str(i) for i in range(100)]


def test_requests_with_the_same_id_are_counted_one_by_one(narrow: Server) -> None:
    replies: list[Reply] = []

    def ask(path: str, **fields: Any) -> None:
        headers = {"x-api-key": "a", "x-request-id": "the-same"}
        replies.append(narrow.request("POST", path, {"model": "fake", **fields}, headers))

    with Held(narrow, "a") as held:
        chats = [("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})] * 4
        asked = [
            threading.Thread(target=ask, args=(path,), kwargs=fields)
            for path, fields in [*chats, *[("/v1/embeddings", {"input": "x"})] * 4]
        ]
        for thread in asked:
            thread.start()
        wait_until(lambda: len(replies) == 5, "the queue takes three of the eight")
        assert {(reply.status, reply.error["code"]) for reply in replies} == {(429, "queue_full")}
        held.release()
        for thread in asked:
            thread.join(30)
        assert [reply.status for reply in replies[5:]] == [200, 200, 200]
        assert all("choices" in reply.json or "data" in reply.json for reply in replies[5:])


@pytest.mark.rule(27)
def test_a_request_that_left_the_queue_never_runs(narrow: Server) -> None:
    (worker,) = narrow.workers
    with Held(narrow, "a") as held:
        body = b'{"model": "fake", "messages": [{"role": "user", "content": "!{\\"kill_at\\": 0}"}]}'
        with narrow.connect() as sock:
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-api-key: b\r\n"
                + b"Content-Length: %d\r\n\r\n" % len(body)
                + body
            )
            wait_for_queue(narrow, 1)
        wait_for_queue(narrow, 0)
        held.release()
        # without the cancel, b's request would run before this one and kill the worker
        assert content(chat(narrow, "a")) == "hello"
        assert narrow.workers == [worker]


# -- deadlines ---------------------------------------------------------------------------------------


@pytest.mark.rule(22)
@pytest.mark.parametrize("header", ["x-stainless-read-timeout", "X-Stainless-Timeout"])
def test_an_answer_is_cut_before_its_client_times_out(fake: Server, header: str) -> None:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": '!{"text": "x", "repeat": 3000, "step_ms": 5}'}],
    }
    reply = fake.request("POST", "/v1/chat/completions", body, {header: "1.5"}, timeout=10)
    choice = reply.json["choices"][0]
    assert choice["finish_reason"] == "length"
    assert 10 < len(choice["message"]["content"]) < 3000
    assert reply.json["usage"]["completion_tokens"] > 10


def test_a_deadline_ends_a_prefill(fake: Server) -> None:
    # the prompt's last token raises an error, so only a prefill that ends before it gives an answer
    n_tail = 3000
    script = json.dumps({"prefill_ms": 100, "fail_at": n_tail})
    body = {"model": "fake", "prompt": f"!{script}\n" + " " * n_tail}
    reply = fake.request("POST", "/v1/completions", body, {"x-stainless-read-timeout": "1.2"})
    choice = reply.json["choices"][0]
    assert (choice["finish_reason"], choice["text"]) == ("length", "")
    assert reply.json["usage"]["completion_tokens"] == 0
    failed = fake.post("/v1/completions", prompt=f'!{{"fail_at": {n_tail}}}\n' + " " * n_tail)
    assert (failed.status, failed.error["code"]) == (500, "model_error"), (
        "the prompt must fail at its last token"
    )


def test_a_deadline_ends_the_wait_in_the_queue(narrow: Server) -> None:
    with Held(narrow, "a") as held:
        body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
        headers = {"x-api-key": "b", "x-stainless-read-timeout": "1.5"}
        reply = narrow.request("POST", "/v1/chat/completions", body, headers)
        held.release()
        assert (reply.status, reply.error["code"]) == (408, "queue_timeout")
        assert int(reply.headers["retry-after"]) >= 1


def test_a_stream_has_no_deadline(fake: Server) -> None:
    body = {
        "model": "fake",
        "stream": True,
        "messages": [{"role": "user", "content": '!{"text": "x", "repeat": 200, "step_ms": 5}'}],
    }
    reply = fake.request("POST", "/v1/chat/completions", body, {"x-stainless-read-timeout": "0.6"})
    assert reply.events[-2]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("limit", ["nan", "inf", "-1", "0", "x", "1e999", "600"])
def test_an_invalid_time_limit_is_ignored(fake: Server, limit: str) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
    reply = fake.request("POST", "/v1/chat/completions", body, {"x-stainless-read-timeout": limit})
    assert reply.json["choices"][0]["finish_reason"] == "stop"


def test_request_ids(fake: Server) -> None:
    for given, kept in (("trace-1.a_B", True), ("x" * 129, False), ("a b", False), ("", False)):
        for path in ("/v1/models", "/nowhere"):
            got = fake.request("GET", path, headers={"X-Request-ID": given}).headers["x-request-id"]
            assert (got == given) is kept
            assert got
