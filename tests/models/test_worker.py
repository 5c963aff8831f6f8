"""Worker processes that answer, die, hang, refuse a model and break the protocol."""

import asyncio
import os
import signal
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.models.workers import FAKE, Sink, faulty, generate, run, script, scripted
from tinyoai import wire
from tinyoai.models.pending_calls import EventQueue, PendingCall, Stage
from tinyoai.models.spawn import spawn_worker
from tinyoai.models.worker import STALL_S, LoadDied, LoadError, Worker, stall_limit

SCRIPTED = wire.Load(path="", name="scripted", engine="", n_slots=2)


@pytest.fixture
def stand_in() -> Iterator[None]:
    """Makes the workers run the scripted worker."""
    with scripted():
        yield


class Call:
    """One request and its events so far."""

    def __init__(self, worker: Worker, text: str, **options: Any) -> None:
        self.queue = EventQueue()
        self.pending: PendingCall
        (self.pending,) = worker.send({0: generate(text)}, self.queue, **options)

    async def until(self, kind: type) -> wire.Event:
        """Returns the next event of this kind."""
        while True:
            _, event = await self.queue.get()
            if isinstance(event, kind):
                return event

    async def text(self) -> tuple[str, wire.Event]:
        """Returns all text and the last event."""
        text = ""
        while True:
            _, event = await self.queue.get()
            if isinstance(event, wire.Content):
                text += event.text
            elif isinstance(event, wire.Final):
                return text, event


def load_with(**fields: Any) -> wire.Load:
    """Returns a Load with a script."""
    return wire.Load(path="", name="scripted", engine="", template=script(**fields))


async def failure(call: Call) -> str:
    """Returns the message of a call that ended with its worker's death."""
    _, event = await call.text()
    assert isinstance(event, wire.Failed)
    assert event.kind == "WorkerDied"
    return event.message


@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop])
def test_a_worker_answers_and_exits(factory: Any) -> None:
    async def body() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        assert worker.ready.info.engine == "fake"
        text, event = await Call(worker, "hello\n").text()
        assert text == "hello"
        assert isinstance(event, wire.Done)
        await worker.stop()
        assert await worker.ended == "was stopped"
        with pytest.raises(ProcessLookupError):
            os.kill(worker.pid, 0)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(body())


def test_a_worker_that_was_spawned_before_the_loop() -> None:
    spawned = spawn_worker()

    async def body() -> None:
        worker = await Worker.start(FAKE, timeout=30, spawned=spawned)
        assert worker.pid == spawned.process.pid
        assert (await Call(worker, "hello\n").text())[0] == "hello"
        await worker.stop()

    run(body())


def test_a_spawned_worker_that_is_never_used_is_ended() -> None:
    spawned = spawn_worker()
    spawned.close()
    assert not Path(f"/proc/{spawned.process.pid}").exists()


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_killed_worker_fails_its_calls_with_the_reason(number: signal.Signals) -> None:
    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30)
        call = Call(worker, script(hold=True))
        await call.until(wire.Accepted)
        os.kill(worker.pid, number)
        assert number.name in await failure(call)
        assert number.name in await worker.ended
        assert "has ended" in await failure(Call(worker, "late"))
        assert worker.n_open == 0
        await worker.stop()

    run(body())


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("stage", ["started", "queued", "accepted", "content"])
def test_a_call_that_was_started_says_so_when_its_worker_dies(stage: str) -> None:
    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30)
        silent, call = Call(worker, script(silent=True)), Call(worker, script(die=stage))
        await failure(call)
        await failure(silent)
        assert call.pending.started
        assert not silent.pending.started
        await worker.stop()

    run(body())


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("factory", [None, uvloop.new_event_loop])
@pytest.mark.parametrize("write", [False, True])
def test_the_last_messages_count_although_the_exit_is_seen_first(factory: Any, write: bool) -> None:
    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30)
        call = Call(worker, script(die="queued"))
        status = Path(f"/proc/{worker.pid}/status")
        while "zombie" not in status.read_text():  # the loop reads none of these messages
            time.sleep(0.001)
        if write:  # this write fails and closes the transport
            late = Call(worker, "late")
            await asyncio.sleep(0)
        worker._process._finish()
        await failure(call)
        assert call.pending.stage is Stage.QUEUED
        if write:
            await failure(late)
            assert not late.pending.started
        await worker.stop()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(body())


@pytest.mark.usefixtures("stand_in")
def test_a_worker_that_breaks_the_protocol_is_ended() -> None:
    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30)
        held = Call(worker, script(hold=True))
        await held.until(wire.Accepted)
        assert "broke the protocol" in await failure(Call(worker, script(breach=True)))
        assert "broke the protocol" in await failure(held)
        assert "Done of request 2" in await worker.ended
        await worker.stop()

    run(body())


@pytest.mark.usefixtures("stand_in")
def test_a_busy_worker_without_heartbeats_is_ended() -> None:
    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30, stall_s=0.2)
        worker._longest_silence_s = 0.0  # a slow machine's startup must not lengthen the limit under test
        assert "no sign of life" in await failure(Call(worker, script(silent=True)))
        assert "no sign of life" in await worker.ended
        await worker.stop()

    run(body())


@pytest.mark.usefixtures("stand_in")
def test_a_worker_with_slow_steps_is_not_hung(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        worker = await Worker.start(load_with(max_step_s=5.0), timeout=30)
        call = Call(worker, script(hold=True))
        await call.until(wire.Accepted)
        worker._last_heard -= 99  # less than 20 steps of 5 s
        worker._watch()
        assert worker.alive
        worker._receive([wire.Heartbeat(max_step_s=10.0)])
        worker._longest_silence_s = 0.0
        worker._last_heard -= 199
        worker._watch()
        assert worker.alive
        worker._last_heard -= 2
        worker._watch()
        assert "no sign of life for 200" in await failure(call)
        await worker.stop()

    run(body())


@pytest.mark.parametrize(
    ("step", "silence", "limit"), [(0, 0, STALL_S), (1.5, 0, STALL_S), (2, 1, 40), (1, 12, 240)]
)
def test_the_stall_limit(step: float, silence: float, limit: float) -> None:
    assert stall_limit(STALL_S, step, silence) == limit


@pytest.mark.usefixtures("stand_in")
def test_a_stopped_process_does_not_delay_the_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyoai.models.worker.STOP_S", 0.1)

    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30)
        os.kill(worker.pid, signal.SIGSTOP)
        await worker.stop()
        assert worker.ended.done()
        assert not Path(f"/proc/{worker.pid}").exists()

    run(body())


def test_cancel_ends_a_running_call_and_no_other() -> None:
    async def body() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        long = [Call(worker, '!{"text": "x", "repeat": 3000, "step_ms": 1}\n') for _ in range(2)]
        for call in long:
            await call.until(wire.Content)
        assert worker.n_running == 2  # both slots are busy
        worker.cancel([call.pending for call in long])
        for call in long:
            _, event = await call.text()
            assert isinstance(event, wire.Failed)
            assert event.kind == "Cancelled"
        assert worker.n_open == 0
        assert (await Call(worker, "after\n").text())[0] == "after"
        worker.cancel([call.pending for call in long])
        await worker.stop()

    run(body())


@pytest.mark.usefixtures("stand_in")
def test_a_fault_in_a_sink_ends_its_call_in_the_worker_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        worker = await Worker.start(SCRIPTED, timeout=30)
        other = Call(worker, script(hold=True))
        await other.until(wire.Accepted)
        call = Call(worker, script(hold=True), sink=Sink(faulty))
        await call.until(wire.Accepted)
        assert isinstance((await Call(worker, script(say="now")).text())[1], wire.Done)
        _, event = await call.text()
        assert isinstance(event, wire.Failed)
        assert event.kind == "InternalError"
        assert isinstance((await Call(worker, script(release=True)).text())[1], wire.Done)
        assert isinstance((await other.text())[1], wire.Done)
        assert worker.alive
        await worker.stop()

    with caplog.at_level("CRITICAL", "tinyoai.worker"):
        run(body())


@pytest.mark.usefixtures("stand_in")
def test_a_refused_model_says_why() -> None:
    async def body() -> None:
        with pytest.raises(LoadError, match="too new") as caught:
            await Worker.start(load_with(refuse="the file is too new"), timeout=30)
        assert not isinstance(caught.value, LoadDied)

    run(body())


@pytest.mark.usefixtures("stand_in")
def test_a_process_that_dies_at_load_says_how(tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(LoadDied, match="SIGKILL"):
            await Worker.start(load_with(deaths=1, count=str(tmp_path / "count")), timeout=30)

    run(body())


def processes() -> set[str]:
    """Returns the child processes of this process."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.usefixtures("stand_in")
def test_a_load_that_takes_too_long_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyoai.models.worker.STOP_S", 0.1)
    before = processes()

    async def body() -> None:
        with pytest.raises(LoadError, match="longer"):
            await Worker.start(load_with(hang=True), timeout=0.1)

    run(body())
    assert processes() == before


@pytest.mark.usefixtures("stand_in")
def test_a_load_that_is_cancelled_leaves_no_process() -> None:
    before = processes()

    async def cancelled(after: Coroutine[Any, Any, None]) -> None:
        loading = asyncio.ensure_future(Worker.start(load_with(hang=True), timeout=30))
        await after
        loading.cancel()
        await asyncio.wait({loading})

    run(cancelled(asyncio.sleep(0)))
    assert processes() == before
    run(cancelled(asyncio.sleep(0.05)))
    assert processes() == before


def test_a_frame_that_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        with scripted():
            worker = await Worker.start(SCRIPTED, timeout=30)
            monkeypatch.setattr("tinyoai.frames.MAX_FRAME", 1000)
            _, event = await Call(worker, "x" * 1000).text()
            assert isinstance(event, wire.Failed)
            assert event.kind == "PayloadTooLarge"
            assert (await Call(worker, "small").text())[0] == "small"
            await worker.stop()

    run(body())


def test_a_worker_ignores_signals_to_its_process_group() -> None:
    async def body() -> None:
        worker = await Worker.start(FAKE, timeout=30)
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
        text, last = await Call(worker, "hello\n").text()
        assert (text, type(last)) == ("hello", wire.Done)
        await worker.stop()

    run(body())
