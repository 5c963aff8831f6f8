"""The core of generation against a scripted lease, on a clock that jumps from timer to timer."""

import asyncio
import selectors
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, cast

import pytest

from tinyoai import errors, wire
from tinyoai.api import generation
from tinyoai.api.generation import Answer, StreamFormat
from tinyoai.models.pending_calls import EventSink
from tinyoai.web.exchange import Exchange

START = 1000.0
INFO = wire.ModelInfo(
    name="m", architecture="llama", quantization="Q4", engine="fake", n_params=1, n_vocab=2, n_ctx=3,
    n_ctx_train=4, n_embd=5, file_size=6, bos_id=1, eos_id=2, eog_ids=(2,), special={}, chat_template="",
    add_bos=True, add_space_prefix=False,
)  # fmt: skip
READY = wire.Ready(info=INFO, n_slots=4, n_threads=1, version="1")


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class Loop(asyncio.SelectorEventLoop):
    """An event loop that never sleeps: its clock jumps to the next timer."""

    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Returns the virtual time in seconds."""
        return self._jumping.now


def run(main: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine."""
    with asyncio.Runner(loop_factory=Loop) as runner:
        runner.run(main)


class FakeExchange:
    """Records what is sent, and how many seconds after the head."""

    client = "me"
    scope = "mine"
    chunked = False

    def __init__(self, head: dict[bytes, bytes] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self.head = head or {}
        self.n_tokens = 0
        self.extra_headers: list[tuple[str, str]] = []
        self.last_sent = 0.0
        self.log: list[tuple[float, str]] = []
        self.writes: list[int] = []
        """The number of events in each write."""
        self.congested = False

    @property
    def elapsed_ms(self) -> float:
        return (self._loop.time() - self._begun) * 1000.0

    @property
    def sent(self) -> list[str]:
        return [text for _, text in self.log]

    def _note(self, text: str) -> None:
        self.last_sent = self._loop.time()
        self.log.append((round(self.elapsed_ms / 1000.0, 3), text))

    def start_stream(self) -> None:
        self._note("head")

    def send(self, data: bytes) -> None:
        events = [event.removeprefix("data: ") for event in data.decode().split("\n\n")[:-1]]
        self.writes.append(len(events))
        for event in events:
            self._note(event)

    def end_stream(self) -> None:
        self._note("end")

    def fail(self, error: errors.ApiError) -> None:
        self._note(f"error {error.code}")

    async def drain(self) -> None:
        await asyncio.sleep(1)
        self._note("drained")
        self.congested = False


Step = float | tuple[int, wire.Event] | tuple[int, list[wire.Event]] | Exception | Callable[[], None]
"""Seconds to wait, an event of a body or several at once, an exception in the lease, or a call."""


class FakeLease:
    """Plays a script. All but the end goes to the sink first, as from a worker's socket."""

    name = "m"

    def __init__(self, *script: Step, load_s: float = 0.0, refusal: errors.ApiError | None = None) -> None:
        self.script = script
        self.load_s = load_s
        self.refusal = refusal
        self.loading = load_s > 0
        self.deadlines: list[float | None] = []
        self.patient: bool | None = None
        self.bodies: Sequence[wire.Body] = ()
        self.closed = False
        self.queued: list[wire.Event] = []
        """Events that were not taken at once."""

    async def ready(self, deadline: float | None = None, patient: bool = False) -> wire.Ready:
        self.deadlines.append(deadline)
        self.patient = patient
        await asyncio.sleep(self.load_s)
        if self.refusal is not None:
            raise self.refusal
        self.loading = False
        return READY

    async def run(
        self,
        bodies: Sequence[wire.Body],
        *,
        client: str = "",
        scope: str = "",
        deadline: float | None = None,
        sink: EventSink,
    ) -> AsyncGenerator[tuple[int, wire.Event], None]:
        self.bodies = bodies
        self.deadlines.append(deadline)
        assert (client, scope) == ("me", "mine")
        try:
            for step in self.script:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, Exception):
                    raise step
                elif not isinstance(step, tuple):
                    step()
                elif isinstance(step[1], wire.Final):
                    yield step[0], step[1]
                else:
                    events = step[1] if isinstance(step[1], list) else [step[1]]
                    left = [event for event in events if not sink.on_event(step[0], event)]
                    sink.flush()
                    self.queued += left
                    for event in left:
                        yield step[0], event
        finally:
            self.closed = True


def queued(body: int = 0) -> tuple[int, wire.Event]:
    """Returns a Queued: the body waits for a slot."""
    return body, wire.Queued(body + 1, 7)


def accepted(body: int = 0, queue_ms: float = 0.0) -> tuple[int, wire.Event]:
    """Returns an Accepted: the body has a slot."""
    return body, wire.Accepted(id=body + 1, n_prompt=7, n_cached=2, queue_ms=queue_ms)


def content(text: str, choice: int = 0, body: int = 0) -> tuple[int, wire.Event]:
    """Returns one piece of text."""
    return body, wire.Content(id=body + 1, text=text, choice=choice)


def ended(choice: int = 0, body: int = 0, n: int = 3) -> tuple[int, wire.Event]:
    """Returns the end of a choice."""
    return body, wire.ChoiceDone(
        id=body + 1,
        choice=choice,
        finish_reason="stop",
        n_cached=2,
        n_generated=n,
        prompt_ms=1,
        predicted_ms=2,
    )


def done(body: int = 0) -> tuple[int, wire.Event]:
    """Returns the Done of a body."""
    return body, wire.Done(id=body + 1, n_prompt=7, n_cached=2)


def failed(kind: str = "ModelError", body: int = 0, **more: Any) -> tuple[int, wire.Event]:
    """Returns the Failed of a body."""
    return body, wire.Failed(id=body + 1, kind=kind, message="no", **more)


def bodies(n_bodies: int = 1, n: int = 1) -> list[wire.Generate]:
    """Returns the bodies of a request."""
    return [wire.Generate(prompt=[], sampling=wire.Sampling(), n=n) for _ in range(n_bodies)]


class Format(StreamFormat):
    """A readable stream format: "+1" opens choice 1, "1:x" is a piece, "-1" ends the choice."""

    opens = True

    def first(self, index: int) -> bytes | None:
        return b"+%d" % index if self.opens else None

    def content(self, index: int, event: wire.Content) -> bytes:
        if event.text == "bad":
            raise RuntimeError("cannot encode this")
        return f"{index}:{event.text}".encode()

    def last(self, index: int) -> bytes:
        return b"-%d" % index

    def end(self) -> list[bytes]:
        waited = f" waited {self.answer.queue_ms:.0f}" if self.answer.waited else ""
        return [f"total {self.answer.n_prompt}+{self.answer.n_generated}{waited}".encode()]


class Mute(Format):
    """A Format without an event that opens a choice."""

    opens = False


def as_lease(lease: FakeLease) -> Any:
    """Casts the scripted lease to a lease."""
    return lease


async def stream(
    lease: FakeLease, n_bodies: int = 1, n: int = 1, form: type[Format] = Format
) -> FakeExchange:
    """Streams the answer of a script."""
    exchange = FakeExchange()
    await generation.stream(cast(Exchange, exchange), as_lease(lease), bodies(n_bodies, n), form)
    return exchange


async def fold(
    lease: FakeLease, n_bodies: int = 1, n: int = 1, head: dict[bytes, bytes] | None = None, late: float = 0.0
) -> tuple[FakeExchange, Answer]:
    """Folds the answer of a script. The request starts `late` seconds after the head."""
    exchange = FakeExchange(head)
    await asyncio.sleep(late)
    answer = await generation.fold(cast(Exchange, exchange), as_lease(lease), bodies(n_bodies, n))
    return exchange, answer


# -- whole answers ---------------------------------------------------------------------------------


def test_choices_of_several_prompts_have_one_index() -> None:
    async def main() -> None:
        script = [
            accepted(1, 5.0), content("d", 1, 1), accepted(0, 3.0), content("a"), content("b", 1), content("c", 0, 1),
            ended(1, 1, 1), ended(0, 1, 1), ended(1), done(1), content("a"), ended(0, 0, 2), done(),
        ]  # fmt: skip
        exchange, answer = await fold(FakeLease(*script), 2, 2)
        assert [choice.text for choice in answer.choices] == ["aa", "b", "c", "d"]
        assert (answer.n_prompt, answer.n_cached, answer.n_generated) == (14, 4, 7)
        assert exchange.n_tokens == 21
        assert exchange.extra_headers == [("x-queue-ms", "5.000")]

    run(main())


def test_one_body_asks_for_all_choices() -> None:
    async def main() -> None:
        lease = FakeLease(accepted(), ended(), ended(1), ended(2), done())
        await fold(lease, 1, 3)
        (body,) = lease.bodies
        assert isinstance(body, wire.Generate)
        assert body.n == 3

    run(main())


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ([accepted(), ended(), failed("ModelError")], errors.ModelError),
        ([accepted(), ended(), failed("RuntimeError")], errors.InternalError),
        ([accepted(), ended(), RuntimeError("broken")], RuntimeError),
        ([accepted(), ended(), failed("WorkerDied")], errors.WorkerDied),
        ([accepted(), ended(), done()], errors.InternalError),
        ([accepted(), ended(), ended(1)], errors.InternalError),
        ([accepted(), content("a", 1), ended(), done()], errors.InternalError),
        ([], errors.InternalError),
    ],
)
def test_a_fault_in_one_choice_fails_the_whole_answer(script: list[Step], kind: type[Exception]) -> None:
    async def main() -> None:
        lease = FakeLease(*script)
        with pytest.raises(kind):
            await fold(lease, 1, 2)
        assert lease.closed

    run(main())


@pytest.mark.parametrize("broken", [[], [accepted(1)], [accepted(1), ended(0, 1)], [failed(body=1)]])
def test_a_fault_in_one_prompt_fails_the_whole_answer(broken: list[Step]) -> None:
    async def main() -> None:
        with pytest.raises(errors.InternalError):
            await fold(FakeLease(accepted(), ended(), done(), *broken), 2)

    run(main())


def test_a_failure_keeps_its_code_param_and_retry_after() -> None:
    async def main() -> None:
        step = failed("Overloaded", code="queue_full", param="messages", retry_after=12.0)
        with pytest.raises(errors.Overloaded) as caught:
            await fold(FakeLease(step))
        assert (caught.value.code, caught.value.param) == ("queue_full", "messages")
        assert caught.value.headers["retry-after"] == "12"

    run(main())


def test_a_cut_answer_is_charged_by_its_pieces() -> None:
    async def main() -> None:
        exchange = FakeExchange()
        lease = FakeLease(accepted(), content("a"), content("b"), failed())
        with pytest.raises(errors.ModelError):
            await generation.fold(cast(Exchange, exchange), as_lease(lease), bodies())
        assert exchange.n_tokens == 7 + 2

    run(main())


# -- the client's time limit -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "due"),
    [
        ({b"x-stainless-read-timeout": b"3"}, 2.7),
        ({b"x-stainless-timeout": b"600"}, 595.0),
        ({b"x-stainless-read-timeout": b"1"}, 0.75),
        ({b"x-stainless-read-timeout": b"0.1"}, 0.0),
        ({b"x-stainless-read-timeout": b"x", b"x-stainless-timeout": b"20"}, 18.0),
        ({b"x-stainless-read-timeout": b"-1"}, None),
        ({b"x-stainless-read-timeout": b"inf"}, None),
        ({b"x-stainless-read-timeout": b"nan"}, None),
        ({b"x-stainless-read-timeout": b"1e7"}, None),
        ({}, None),
    ],
)
def test_an_unstreamed_answer_ends_before_the_client_times_out(
    head: dict[bytes, bytes], due: float | None
) -> None:
    async def main() -> None:
        lease = FakeLease(accepted(), ended(), done(), load_s=1.0)
        await fold(lease, head=head, late=0.5)  # the time limit starts at the head
        expected = None if due is None else pytest.approx(START + due)
        assert lease.deadlines == [expected, expected]
        assert lease.patient is False

    run(main())


def test_a_stream_has_no_time_limit() -> None:
    async def main() -> None:
        exchange = FakeExchange({b"x-stainless-read-timeout": b"3"})
        lease = FakeLease(accepted(), ended(), done())
        await generation.stream(cast(Exchange, exchange), as_lease(lease), bodies(), Format)
        assert lease.deadlines == [None, None]
        assert lease.patient is True

    run(main())


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_from_its_head_to_its_end() -> None:
    async def main() -> None:
        lease = FakeLease(accepted(0, 1.5), content("a"), content("b"), ended(), done())
        exchange = await stream(lease)
        assert exchange.sent == ["head", "+0", "0:a", "0:b", "-0", "total 7+3", "end"]
        assert exchange.extra_headers == [("x-queue-ms", "1.500")]
        assert exchange.n_tokens == 10
        assert lease.queued == []

    run(main())


def test_choices_first_appear_in_ascending_order() -> None:
    async def main() -> None:
        script = [
            accepted(1), content("d", 1, 1), ended(1, 1), content("c", 0, 1), accepted(), content("b", 1),
            content("a"), ended(), ended(1), ended(0, 1), done(), done(1),
        ]  # fmt: skip
        exchange = await stream(FakeLease(*script), 2, 2, Mute)
        assert exchange.sent[1:-2] == ["0:a", "1:b", "2:c", "3:d", "-3", "-0", "-1", "-2"]

    run(main())


def test_choices_are_opened_in_ascending_order() -> None:
    async def main() -> None:
        script = [
            accepted(1), content("c", 0, 1), ended(0, 1), done(1), accepted(), content("b", 1), ended(), ended(1), done(),
        ]  # fmt: skip
        exchange = await stream(FakeLease(*script, ended(1, 1)), 2, 2)
        assert exchange.sent[1:-2] == ["+0", "+1", "+2", "2:c", "-2", "+3", "1:b", "-0", "-1", "-3"]

    run(main())


def test_a_stream_waits_for_a_slow_reader_and_keeps_its_order() -> None:
    async def main() -> None:
        exchange = FakeExchange()

        def congest() -> None:
            exchange.congested = True

        lease = FakeLease(accepted(), content("a"), congest, content("b"), content("c"), ended(), done())
        await generation.stream(cast(Exchange, exchange), as_lease(lease), bodies(), Format)
        assert exchange.sent[2:6] == ["0:a", "0:b", "drained", "0:c"]
        assert lease.queued == [content("b")[1]]

    run(main())


def test_events_that_arrive_together_leave_in_one_write() -> None:
    async def main() -> None:
        together = [accepted()[1], content("a")[1], content("b")[1], ended()[1]]
        exchange = await stream(FakeLease((0, together), done()))
        assert exchange.sent == ["head", "+0", "0:a", "0:b", "-0", "total 7+3", "end"]
        assert exchange.writes == [4, 1]

    run(main())


@pytest.mark.parametrize(
    "script", [[failed("ContextLengthExceeded")], [queued(), failed("Overloaded")], [queued(), 9.0, failed()]]
)
def test_an_error_before_the_head_keeps_its_status(script: list[Step]) -> None:
    async def main() -> None:
        exchange = FakeExchange()
        with pytest.raises(errors.ApiError):
            await generation.stream(cast(Exchange, exchange), as_lease(FakeLease(*script)), bodies(), Format)
        await asyncio.sleep(100)
        assert exchange.sent == []

    run(main())


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ([accepted(), content("a"), failed()], "model_error"),
        ([accepted(), content("a"), ended()], "internal_error"),
        ([accepted(), content("a"), done()], "internal_error"),
    ],
)
def test_a_failure_in_a_stream_is_an_event(script: list[Step], code: str) -> None:
    async def main() -> None:
        exchange = await stream(FakeLease(*script))
        assert exchange.sent[:3] == ["head", "+0", "0:a"]
        assert exchange.sent[-1] == f"error {code}"
        assert "total 7+3" not in exchange.sent

    run(main())


def test_an_exception_in_on_content_reaches_the_lease() -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="cannot encode this"):
            await stream(FakeLease(accepted(), content("bad"), ended(), done()))

    run(main())


# -- streams that wait -------------------------------------------------------------------------------


def test_a_queued_stream_begins_after_ten_seconds_and_sends_comments() -> None:
    async def main() -> None:
        script = [queued(), 35.0, accepted(0, 35_000.0), content("a"), ended(), done()]
        exchange = await stream(FakeLease(*script))
        assert exchange.log[:4] == [(10.0, "head"), (20.0, ": ping"), (30.0, ": ping"), (35.0, "+0")]
        assert exchange.sent[-2] == "total 7+3 waited 35000"
        assert exchange.extra_headers == []

    run(main())


def test_a_stream_whose_model_loads_begins_after_ten_seconds() -> None:
    async def main() -> None:
        lease = FakeLease(queued(), accepted(0, 4.0), ended(), done(), load_s=95.0)
        exchange = await stream(lease)
        assert exchange.log[0] == (10.0, "head")
        assert exchange.log[1:9] == [(10.0 * i, ": ping") for i in range(2, 10)]
        assert exchange.log[9] == (95.0, "+0")
        assert exchange.sent[-2] == "total 7+3 waited 4"

    run(main())


def test_a_load_of_less_than_ten_seconds_keeps_the_header() -> None:
    async def main() -> None:
        exchange = await stream(FakeLease(queued(), accepted(0, 4.0), ended(), done(), load_s=9.0))
        assert exchange.log[0] == (9.0, "head")
        assert exchange.extra_headers == [("x-queue-ms", "4.000")]

    run(main())


def test_a_stream_that_is_queued_late_begins_at_once() -> None:
    async def main() -> None:
        exchange = await stream(FakeLease(14.0, queued(), 3.0, accepted(), ended(), done()))
        assert exchange.log[:2] == [(14.0, "head"), (17.0, "+0")]

    run(main())


def test_nothing_is_sent_while_neither_queued_nor_loading() -> None:
    async def main() -> None:
        exchange = FakeExchange()
        lease = FakeLease(25.0, failed("ContextLengthExceeded"))
        with pytest.raises(errors.ContextLengthExceeded):
            await generation.stream(cast(Exchange, exchange), as_lease(lease), bodies(), Format)
        assert exchange.sent == []

    run(main())


@pytest.mark.parametrize(
    "lease",
    [
        FakeLease(load_s=40.0, refusal=errors.ModelFailed("no")),
        FakeLease(queued(), 40.0, failed("ModelFailed")),
    ],
)
def test_an_error_after_the_head_is_an_event_with_the_same_code(lease: FakeLease) -> None:
    async def main() -> None:
        exchange = await stream(lease)
        assert exchange.sent == ["head", ": ping", ": ping", ": ping", "error model_failed"]

    run(main())


def test_comments_come_only_after_silence_and_end_with_the_stream() -> None:
    async def main() -> None:
        exchange = await stream(
            FakeLease(
                accepted(), *[step for _ in range(4) for step in (8.0, content("a"))], 11.0, ended(), done()
            )
        )
        assert [at for at, text in exchange.log if text == ": ping"] == [42.0]
        n_sent = len(exchange.log)
        await asyncio.sleep(100)
        assert len(exchange.log) == n_sent

    run(main())


def test_comments_end_when_the_client_disconnects() -> None:
    async def main() -> None:
        exchange = FakeExchange()
        lease = FakeLease(accepted(), 1000.0)
        running: Awaitable[None] = asyncio.ensure_future(
            generation.stream(cast(Exchange, exchange), as_lease(lease), bodies(), Format)
        )
        await asyncio.sleep(15)
        cast("asyncio.Future[None]", running).cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert lease.closed
        n_sent = len(exchange.log)
        await asyncio.sleep(100)
        assert len(exchange.log) == n_sent

    run(main())


# -- shared by all formats ----------------------------------------------------------------------------


def test_the_fingerprint_changes_with_model_and_version() -> None:
    from msgspec import structs

    first = generation.fingerprint(READY)
    assert first == generation.fingerprint(structs.replace(READY, n_slots=1, n_threads=9))
    assert first != generation.fingerprint(structs.replace(READY, version="2"))
    assert first != generation.fingerprint(structs.replace(READY, info=structs.replace(INFO, file_size=7)))
