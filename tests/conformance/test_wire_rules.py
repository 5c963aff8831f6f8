"""The rules that OpenAI's clients depend on, one by one, against a real server with the scripted engine."""

import json
import re
import socket
import threading
import time
from typing import Any

import pytest

from tests.serving import Server, serve, wait_until

LONG = '!{"text": "x", "repeat": 3000, "step_ms": 20}'


def stream(server: Server, text: str, **fields: Any) -> list[Any]:
    """Returns the events of a streamed chat."""
    return server.chat(text, stream=True, **fields).events


def texts(events: list[Any], index: int = 0) -> str:
    """Returns the text of one choice, joined."""
    found = ""
    for event in events:
        for choice in event["choices"] if isinstance(event, dict) else ():
            if choice["index"] == index:
                found += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
    return found


# -- streaming -------------------------------------------------------------------------------------


@pytest.mark.rule(1)
def test_chunks_agree_with_each_other(fake: Server) -> None:
    *chunks, done = stream(fake, "hello")
    assert done == "[DONE]"
    for key in ("id", "created", "model", "object", "system_fingerprint"):
        assert len({chunk[key] for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[0]["model"] == fake.model
    for chunk in chunks:
        for choice in chunk["choices"]:
            assert {"finish_reason", "logprobs", "index", "delta"} <= set(choice)


@pytest.mark.rule(2)
def test_first_chunk_has_the_role_and_last_the_reason(fake: Server) -> None:
    *chunks, _ = stream(fake, "hello")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    for chunk in chunks[1:-1]:
        assert set(chunk["choices"][0]["delta"]) == {"content"}
        assert chunk["choices"][0]["finish_reason"] is None


@pytest.mark.rule(3)
def test_usage_has_a_chunk_of_its_own_if_requested(fake: Server) -> None:
    *chunks, last, _ = stream(fake, "hello", stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    *chunks, _ = stream(fake, "hello")
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)


@pytest.mark.rule(3)
def test_stream_options_without_a_stream_are_ignored(fake: Server) -> None:
    reply = fake.chat("hello", stream_options={"include_usage": True})
    assert reply.json["choices"][0]["message"]["content"] == "hello"
    assert reply.json["object"] == "chat.completion"


@pytest.mark.rule(4)
def test_a_failure_in_a_stream_is_an_error_event_and_no_done(fake: Server) -> None:
    events = stream(fake, '!{"text": "abcdef", "nan_at": 3}')
    assert texts(events[:-1]) == "abc"
    assert events[-1]["error"]["code"] == "model_error"
    assert set(events[-1]["error"]) == {"message", "type", "param", "code"}


@pytest.mark.rule(4)
def test_errors_known_early_are_sent_before_the_stream(fake: Server) -> None:
    for fields in (
        {"model": "gpt-4"},
        {"temperature": 9},
        {"messages": [{"role": "user", "content": "x" * 9000}]},
    ):
        reply = fake.post(
            "/v1/chat/completions",
            **{"messages": [{"role": "user", "content": "x"}], "stream": True, **fields},
        )
        assert reply.status in (400, 404)
        assert reply.error["message"]


@pytest.mark.rule(5)
def test_a_code_point_is_never_split(fake: Server) -> None:
    said = "a\N{GRINNING FACE}é漢字"
    events = stream(fake, said)
    pieces = [e["choices"][0]["delta"].get("content") for e in events[1:-2]]
    assert pieces == list(said)


@pytest.mark.rule(5)
@pytest.mark.parametrize("stop", ["STOP", ["zzz", "STOP"], ["ST", "STOP"]])
def test_a_stop_sequence_is_never_sent(fake: Server, stop: Any) -> None:
    events = stream(fake, "before STOP after", stop=stop)
    assert texts(events[:-1]) == "before "
    reply = fake.chat("before STOP after", stop=stop)
    assert reply.json["choices"][0]["message"]["content"] == "before "
    assert reply.json["choices"][0]["finish_reason"] == "stop"


@pytest.mark.rule(5)
def test_text_that_could_become_a_stop_sequence_is_held_back(fake: Server) -> None:
    events = stream(fake, "a STO b", stop=["STOP"])
    pieces = [e["choices"][0]["delta"].get("content") for e in events[1:-2]]
    assert pieces == ["a", " ", "STO ", "b"]


@pytest.mark.rule(6)
def test_a_silent_stream_gets_comments(fake: Server) -> None:
    # the prefill takes longer than the interval of the comments
    reply = fake.chat('!{"text": "abc", "prefill_ms": 11000}', stream=True)
    assert b": ping\n\n" in reply.body
    assert texts(reply.events[:-1]) == "abc"


@pytest.mark.rule(7)
def test_stream_headers(fake: Server) -> None:
    reply = fake.chat("hello", stream=True)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["transfer-encoding"] == "chunked"


def raw(server: Server, data: bytes, *, until_close: bool = True) -> bytes:
    """Sends bytes and returns all bytes until the server closes."""
    with server.connect() as sock:
        sock.sendall(data)
        got = b""
        while piece := sock.recv(65536):
            got += piece
            if not until_close:
                break
        return got


@pytest.mark.rule(7)
def test_http_1_0_gets_no_chunks_and_a_close(fake: Server) -> None:
    body = json.dumps(
        {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    ).encode()
    got = raw(fake, b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    head, _, rest = got.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.rule(8)
def test_indices_first_appear_in_ascending_order(fake: Server) -> None:
    events = stream(fake, "hello", n=6)[:-1]
    order = [event["choices"][0]["index"] for event in events]
    assert sorted(set(order)) == list(range(6))
    assert list(dict.fromkeys(order)) == list(range(6))
    assert all(texts(events, index) == "hello" for index in range(6))


@pytest.mark.rule(8)
def test_a_faster_choice_waits_for_the_first(fake: Server) -> None:
    fast, slow = '!{"text": "fast"}\n', "!{" + " " * 400 + '"text": "slow"}\n'  # its prefill is slow
    reply = fake.post("/v1/completions", prompt=[slow, fast, fast], stream=True)
    events = reply.events[:-1]
    assert list(dict.fromkeys(event["choices"][0]["index"] for event in events)) == [0, 1, 2]
    assert [texts(events, index) for index in range(3)] == ["slow", "fast", "fast"]


@pytest.mark.rule(8)
def test_several_prompts_stream_in_order(fake: Server) -> None:
    reply = fake.post("/v1/completions", prompt=["ab\n", "cd\n", "ef\n"], stream=True, n=2)
    events = reply.events[:-1]
    order = list(dict.fromkeys(event["choices"][0]["index"] for event in events))
    assert order == list(range(6))
    assert [texts(events, index) for index in range(6)] == ["ab", "ab", "cd", "cd", "ef", "ef"]


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.rule(10)
def test_the_shape_of_an_answer(fake: Server) -> None:
    reply = fake.chat("hello")
    body = reply.json
    assert re.fullmatch(r"chatcmpl-\w+", body["id"])
    assert body["object"] == "chat.completion"
    assert abs(body["created"] - time.time()) < 60
    assert isinstance(body["created"], int)
    assert body["system_fingerprint"].startswith("fp_")
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert choice["logprobs"] is None
    assert choice["finish_reason"] == "stop"
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= 0


@pytest.mark.rule(11)
@pytest.mark.parametrize(
    ("fields", "reason"), [({}, "stop"), ({"max_tokens": 2}, "length"), ({"stop": "l"}, "stop")]
)
def test_finish_reasons(fake: Server, fields: dict[str, Any], reason: str) -> None:
    assert fake.chat("hello", **fields).json["choices"][0]["finish_reason"] == reason


@pytest.mark.rule(12)
def test_ids_are_unique(fake: Server) -> None:
    assert len({fake.chat("hi").json["id"] for _ in range(5)}) == 5


@pytest.mark.rule(13)
def test_timings_in_the_body_and_in_the_last_chunk(fake: Server) -> None:
    names = {
        "cache_n", "cache_miss", "prompt_n", "prompt_ms", "prompt_per_token_ms", "prompt_per_second",
        "predicted_n", "predicted_ms", "predicted_per_token_ms", "predicted_per_second",
    }  # fmt: skip
    body = fake.chat("hello").json
    assert set(body["timings"]) == names
    assert body["timings"]["predicted_n"] == 6
    assert body["timings"]["prompt_n"] + body["timings"]["cache_n"] == body["usage"]["prompt_tokens"]
    assert set(stream(fake, "hello")[-2]["timings"]) == names


@pytest.mark.rule(14)
@pytest.mark.parametrize("prompt", ["ab\n", ["ab\n"], [97, 98, 10], [[97, 98, 10]]])
def test_completion_prompts_in_every_form(fake: Server, prompt: Any) -> None:
    body = fake.post("/v1/completions", prompt=prompt).json
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert [choice["text"] for choice in body["choices"]] == ["ab"]


@pytest.mark.rule(14)
def test_completions_default_to_256_tokens(fake: Server) -> None:
    body = fake.post("/v1/completions", prompt="abc").json
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    assert body["choices"][0]["text"] == (alphabet * 11)[3 : 3 + 256]
    assert (body["usage"]["completion_tokens"], body["choices"][0]["finish_reason"]) == (256, "length")


@pytest.mark.rule(14)
def test_echo_and_legacy_logprobs(fake: Server) -> None:
    body = fake.post("/v1/completions", prompt="abc", echo=True, logprobs=2, max_tokens=2).json
    choice = body["choices"][0]
    assert choice["text"] == "abcde"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == list("abcde")
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(value > -0.01 for value in logprobs["token_logprobs"][1:])
    assert all(len(top) == 2 for top in logprobs["top_logprobs"][1:])
    # the token that ends an answer is in the lists too, without text: evaluation programs rely on it
    ended = fake.post("/v1/completions", prompt='!{"text": "xy"}\n', logprobs=1, max_tokens=9).json
    assert ended["choices"][0]["logprobs"]["tokens"] == ["x", "y", ""]
    assert len(ended["choices"][0]["logprobs"]["tokens"]) == ended["usage"]["completion_tokens"]
    # the chosen token is listed even with top_logprobs 0
    bare = fake.post("/v1/completions", prompt="abc", logprobs=0, max_tokens=2).json["choices"][0]["logprobs"]
    assert [list(top) for top in bare["top_logprobs"]] == [["d"], ["e"]]


def test_streamed_text_and_offsets_equal_the_unstreamed(fake: Server) -> None:
    whole = fake.post("/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=5).json["choices"][0]
    events = fake.post(
        "/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=5, stream=True
    ).events[:-1]
    assert texts(events) == whole["text"]
    offsets = [
        o for e in events if e["choices"][0]["logprobs"] for o in e["choices"][0]["logprobs"]["text_offset"]
    ]
    assert offsets == whole["logprobs"]["text_offset"]


@pytest.mark.rule(14)
def test_best_of_gives_the_likeliest(fake: Server) -> None:
    body = fake.post("/v1/completions", prompt='!{"spread": 2}\n', best_of=4, n=2, seed=1, max_tokens=8).json
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 32
    assert body["choices"][0]["logprobs"] is None


def test_chat_logprobs(fake: Server) -> None:
    choice = fake.chat("hé", logprobs=True, top_logprobs=3).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "hé"
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert choice["logprobs"]["refusal"] is None
    events = stream(fake, "hé", logprobs=True, top_logprobs=3)
    streamed = [
        entry
        for event in events[1:-2]
        if event["choices"][0]["logprobs"]
        for entry in event["choices"][0]["logprobs"]["content"]
    ]
    assert [entry["bytes"] for entry in streamed] == [entry["bytes"] for entry in content]
    assert [entry["logprob"] for entry in streamed] == pytest.approx([entry["logprob"] for entry in content])


# -- requests --------------------------------------------------------------------------------------


@pytest.mark.rule(16, 17)
def test_null_and_fields_without_effect_are_accepted(fake: Server) -> None:
    reply = fake.chat(
        "hello", temperature=None, stop=None, user="u", metadata={"a": "b"}, store=False, service_tier="auto",
        parallel_tool_calls=True, safety_identifier="s", prompt_cache_key="k", verbosity="low",
        modalities=["text"], tools=[], tool_choice="none", response_format={"type": "text"}, nonsense=1,
    )  # fmt: skip
    assert reply.json["choices"][0]["message"]["content"] == "hello"


@pytest.mark.rule(17)
def test_max_completion_tokens_is_max_tokens(fake: Server) -> None:
    assert fake.chat("hello", max_completion_tokens=2).json["choices"][0]["message"]["content"] == "he"
    assert fake.chat("hello", max_completion_tokens=2, max_tokens=4).json["usage"]["completion_tokens"] == 2


@pytest.mark.rule(18)
def test_fields_beyond_openai(fake: Server) -> None:
    fields = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1, "min_tokens": 1, "ignore_eos": True}
    fields["repetition_penalty"] = 1.1
    assert fake.chat("hello", max_tokens=9, **fields).json["usage"]["completion_tokens"] == 9


def test_equal_seeds_give_equal_text_beside_other_requests(fake: Server) -> None:
    request = {"temperature": 1.0, "seed": 11, "max_tokens": 40}
    alone = fake.chat('!{"spread": 2}', **request).json["choices"][0]["message"]["content"]
    found: list[str] = []

    def ask() -> None:
        found.append(fake.chat('!{"spread": 2}', **request).json["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {alone}
    other = fake.chat('!{"spread": 2}', **{**request, "seed": 12}).json["choices"][0]["message"]["content"]
    assert other != alone


def test_n_choices_differ_and_repeat_with_their_seed(fake: Server) -> None:
    def choices() -> list[str]:
        body = fake.chat('!{"spread": 2}', n=3, seed=5, max_tokens=20).json
        return [choice["message"]["content"] for choice in body["choices"]]

    first = choices()
    assert len(set(first)) == 3
    assert choices() == first


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.rule(19)
def test_every_refusal_has_the_error_body(fake: Server) -> None:
    cases: list[tuple[str, str, Any, int, str]] = [
        ("GET", "/nowhere", None, 404, "not_found_error"),
        ("GET", "/v1/models/none", None, 404, "not_found_error"),
        ("GET", "/v1/chat/completions", None, 405, "invalid_request_error"),
        ("DELETE", "/v1/models", None, 405, "invalid_request_error"),
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_request_error"),
        ("POST", "/v1/chat/completions", {"messages": []}, 400, "invalid_request_error"),
        ("POST", "/v1/completions", {"model": "none", "prompt": "x"}, 404, "not_found_error"),
    ]
    for method, path, body, status, kind in cases:
        reply = fake.request(method, path, body)
        assert (reply.status, reply.error["type"]) == (status, kind), (method, path)
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"]


@pytest.mark.rule(19)
def test_an_unknown_model_is_an_error_and_never_replaced(fake: Server) -> None:
    for path, fields in (
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("completions", {"prompt": "x"}),
    ):
        reply = fake.post(f"/v1/{path}", **{**fields, "model": "gpt-4"})
        assert (reply.status, reply.error["code"], reply.error["param"]) == (404, "model_not_found", "model")
        assert "'fake'" in reply.error["message"]


@pytest.mark.rule(19)
def test_the_error_for_a_long_prompt_has_both_counts(fake: Server) -> None:
    reply = fake.chat("x" * 5000)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (
        400,
        "context_length_exceeded",
        "messages",
    )
    assert "4096" in reply.error["message"]
    reply = fake.post("/v1/completions", prompt=[120] * 4100)
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert "4100" in reply.error["message"]
    assert "4096" in reply.error["message"]


@pytest.mark.rule(19)
def test_405_says_what_is_allowed(fake: Server) -> None:
    allowed = fake.get("/v1/completions").headers["allow"]
    assert "POST" in allowed


@pytest.mark.rule(20)
def test_client_mistakes_are_never_a_5xx_and_permanent_failures_are_marked(fake: Server) -> None:
    reply = fake.chat('!{"text": "abc", "nan_at": 0}')
    assert reply.status == 500
    assert reply.headers["x-should-retry"] == "false"


def test_token_ids_out_of_range(fake: Server) -> None:
    for ids in ([260], [-1], [2**31], [2**70], [True], [1.5], [[]], [["a"]]):
        reply = fake.post("/v1/completions", prompt=ids)
        assert reply.status == 400, ids
        assert (reply.error["param"] or "").startswith("prompt")


# -- headers and HTTP ------------------------------------------------------------------------------


@pytest.mark.rule(21)
def test_valid_request_ids_are_kept(fake: Server) -> None:
    assert (
        fake.request("GET", "/health", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    odd = fake.request("GET", "/health", headers={"X-Request-ID": "a" * 500}).headers["x-request-id"]
    assert odd != "a" * 500
    assert float(fake.get("/health").headers["openai-processing-ms"]) >= 0


@pytest.mark.rule(22, 23)
@pytest.mark.parametrize(
    "headers",
    [
        {"x-stainless-read-timeout": "600", "x-stainless-retry-count": "0"},
        {"X-Stainless-Timeout": "600", "Authorization": "Bearer "},
        {"Authorization": "Bearer not-needed"},
        {"x-api-key": "any"},
    ],
)
def test_headers_that_sdks_send_are_accepted(fake: Server, headers: dict[str, str]) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    reply = fake.request("POST", "/v1/chat/completions", body, headers)
    assert reply.json["choices"][0]["message"]["content"] == "hi"


@pytest.mark.rule(22)
def test_a_request_leaves_the_queue_before_its_client_times_out() -> None:
    with serve("--engine", "fake", "--parallel", "1") as server:
        body = json.dumps(
            {"model": "fake", "stream": True, "messages": [{"role": "user", "content": LONG}]}
        ).encode()
        with server.connect() as running:
            running.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
                % (len(body), body)
            )
            assert running.recv(12) == b"HTTP/1.1 200"
            ask = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
            waits = {"x-stainless-read-timeout": "1"}
            reply = server.request("POST", "/v1/chat/completions", ask, waits)
            assert (reply.status, reply.error["code"]) == (408, "queue_timeout")
            assert int(reply.headers["retry-after"]) >= 1
            embed = {"model": "fake", "input": "hi"}
            reply = server.request("POST", "/v1/embeddings", embed, waits)
            assert (reply.status, reply.error["code"]) == (408, "queue_timeout")


@pytest.mark.rule(24)
def test_a_foreign_host_is_refused(fake: Server) -> None:
    got = raw(fake, b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    assert b" 403 " in got.split(b"\r\n")[0]
    assert b'"error"' in got


@pytest.mark.rule(25)
@pytest.mark.parametrize("prefix", ["", "/v1"])
@pytest.mark.parametrize("end", ["", "/"])
def test_paths_with_and_without_v1(fake: Server, prefix: str, end: str) -> None:
    assert fake.get(f"{prefix}/models{end}").json["object"] == "list"


@pytest.mark.rule(25)
def test_head_works_on_every_get(fake: Server) -> None:
    for path in ("/v1/models", "/health", "/v1/models/fake"):
        reply = fake.request("HEAD", path)
        assert (reply.status, reply.body) == (200, b"")
        assert int(reply.headers["content-length"]) == len(fake.get(path).body)


@pytest.mark.rule(25)
def test_model_ids_with_slashes() -> None:
    with serve("--engine", "fake", "--model-name", "meta-llama/Llama-3.1-8B-Instruct") as server:
        for path in ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama%2FLlama-3.1-8B-Instruct"):
            body = server.get(f"/v1/models/{path}").json
            assert (body["id"], body["object"]) == ("meta-llama/Llama-3.1-8B-Instruct", "model")
            assert body["owned_by"]
        assert server.get("/v1/models/meta-llama").status == 404


@pytest.mark.rule(26)
def test_pipelined_requests_are_answered_in_order(fake: Server) -> None:
    one = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    two = b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"
    three = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    got = raw(fake, one + two + three)
    assert re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"404", b"200"]


@pytest.mark.rule(28)
@pytest.mark.parametrize(
    "content_type",
    [None, "application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"],
)
def test_json_is_read_with_any_content_type(fake: Server, content_type: str | None) -> None:
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hi"}]}).encode()
    headers = {"Content-Type": content_type} if content_type else {}
    reply = fake.request("POST", "/v1/chat/completions", body, headers)
    assert reply.json["choices"][0]["message"]["content"] == "hi"


@pytest.mark.rule(28)
@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_a_foreign_page_may_not_post(fake: Server, headers: dict[str, str]) -> None:
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    reply = fake.request("POST", "/v1/chat/completions", body, headers)
    assert (reply.status, reply.error["type"]) == (403, "permission_error")


@pytest.mark.rule(28)
def test_a_compressed_body_is_refused(fake: Server) -> None:
    reply = fake.request("POST", "/v1/chat/completions", b"xx", {"Content-Encoding": "gzip"})
    assert (reply.status, reply.error["type"]) == (415, "invalid_request_error")


@pytest.mark.rule(26)
def test_a_body_over_the_limit(fake: Server) -> None:
    reply = fake.request("POST", "/v1/chat/completions", b"x" * (5 << 20))
    assert (reply.status, reply.error["type"]) == (413, "invalid_request_error")


# -- clients that disconnect ----------------------------------------------------------------------------


def slots_are_free(server: Server) -> None:
    """Waits until no slot is busy and the queue is empty, long before any answer could finish."""
    wait_until(
        lambda: (row := server.status())["slots"]["busy"] == 0 and row["queue"] == 0, "slots stay busy"
    )
    assert server.say("hi") == "hi"


@pytest.mark.rule(27)
@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_disconnects_frees_its_slot(fake: Server, streaming: bool) -> None:
    body = json.dumps(
        {"model": "fake", "stream": streaming, "messages": [{"role": "user", "content": LONG}]}
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
    leavers: list[socket.socket] = []
    for _ in range(12):  # three times the number of slots: some run, the others queue
        sock = fake.connect()
        sock.sendall(head + body)
        leavers.append(sock)
    wait_until(lambda: (row := fake.status())["slots"]["busy"] == 4 and row["queue"] == 8)
    for sock in leavers:
        sock.close()
    # four at a time, 12 answers of 3000 tokens at 20 ms would take three minutes
    slots_are_free(fake)


def test_models_and_health_answer_while_all_slots_are_busy(fake: Server) -> None:
    socks = []
    body = json.dumps({"model": "fake", "messages": [{"role": "user", "content": LONG}]}).encode()
    for _ in range(6):
        sock = fake.connect()
        sock.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        socks.append(sock)
    try:
        assert fake.get("/health").json["status"] == "ok"
        assert [card["id"] for card in fake.get("/v1/models").json["data"]] == ["fake"]
    finally:
        for sock in socks:
            sock.close()


# -- contents of a request -------------------------------------------------------------------------------


@pytest.mark.rule(16)
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "say it"}],
        [{"role": "user", "content": [{"type": "text", "text": "say"}, {"type": "text", "text": " it"}]}],
        [{"role": "system", "content": "x"}, {"role": "user", "content": "say it"}],
        [{"role": "developer", "content": "x"}, {"role": "user", "content": "say it", "name": "Ann"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": []}, {"role": "user", "content": "say it"}],
        [{"role": "tool", "content": "say it", "tool_call_id": "call_1"}],
    ],
)  # fmt: skip
def test_contents_and_roles_in_every_form(fake: Server, messages: list[Any]) -> None:
    reply = fake.post("/v1/chat/completions", messages=messages)
    assert reply.json["choices"][0]["message"]["content"] == "say it"


@pytest.mark.rule(16, 19)
@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content[1]"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "king", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 1}, "messages[0].content"),
    ],
)  # fmt: skip
def test_invalid_messages(fake: Server, message: Any, param: str) -> None:
    reply = fake.post("/v1/chat/completions", messages=[message])
    assert reply.status == 400
    assert reply.error["param"] == param
    assert reply.error["type"] == "invalid_request_error"


@pytest.mark.rule(9)
@pytest.mark.parametrize("field", ["tools", "functions"])
def test_tools_are_refused_by_name(fake: Server, field: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    reply = fake.chat("hello", **{field: [tool]})
    assert reply.status == 400
    assert reply.error["param"] == field
    assert fake.say("hello", **{field: []}) == "hello"


@pytest.mark.rule(14)
def test_suffix_is_refused_where_the_model_has_no_infill_tokens(fake: Server) -> None:
    reply = fake.post("/v1/completions", prompt="a", suffix="b")
    assert reply.status == 400
    assert reply.error["param"] == "suffix"
    assert "infill" in reply.error["message"]
    assert fake.post("/v1/completions", prompt="a\n", suffix="").json["choices"][0]["text"] == "a"


@pytest.mark.rule(14)
def test_sixteen_answers_to_one_prompt(fake: Server) -> None:
    for path, fields in (
        ("/v1/completions", {"prompt": '!{"spread": 2}\n', "max_tokens": 5}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": '!{"spread": 2}'}], "max_tokens": 5},
        ),
    ):
        whole = fake.post(path, n=16, **fields).json
        assert [choice["index"] for choice in whole["choices"]] == list(range(16))
        assert whole["usage"]["completion_tokens"] >= 16
        assert fake.post(path, n=17, **fields).error["param"] == "n"


@pytest.mark.rule(14)
def test_a_prompt_scored_without_a_token_generated(fake: Server) -> None:
    whole = fake.post("/v1/completions", prompt="abc", echo=True, logprobs=2, max_tokens=0).json
    (choice,) = whole["choices"]
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["top_logprobs"][0] is None
    assert all(
        token in top for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True)
    )
    assert whole["usage"]["completion_tokens"] == 0


def test_a_slow_reader_gets_every_piece_once_and_in_order(fake: Server) -> None:
    text = "".join(f"<{i}>" for i in range(12_000))
    body = json.dumps(
        {"model": "fake", "stream": True, "messages": [{"role": "user", "content": text[:1900]}]}
    ).encode()
    many = json.dumps({"text": text[:700], "repeat": 4}).encode()
    script = json.dumps(
        {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "!" + many.decode()}]}
    ).encode()
    for ask, expected in ((body, text[:1900]), (script, text[:700] * 4)):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.connect(("127.0.0.1", fake.port))
            sock.settimeout(30)
            sock.sendall(
                b"POST /v1/chat/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
                % len(ask)
                + ask
            )
            got = b""
            while piece := sock.recv(30_000):
                got += piece
                time.sleep(0.002)
        events = [json.loads(line[6:]) for line in got.decode().split("\n\n") if line.startswith("data: {")]
        assert texts(events) == expected
