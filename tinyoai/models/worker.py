"""The server's handle of one worker process: start, requests, watchdog and end.

Every request gets its Done or Failed from here, even if the process dies. Knows no HTTP, and of a model only the
facts in Ready.
"""

import asyncio
import contextlib
import logging
import math
import signal
from collections.abc import Callable, Iterable, Mapping

from tinyoai import wire
from tinyoai.host import subproc
from tinyoai.models.pending_calls import EventQueue, EventSink, PendingCall, PendingCalls
from tinyoai.models.spawn import SpawnedWorker, spawn_worker

log = logging.getLogger("tinyoai.worker")

STALL_S = 30.0
"""Seconds of silence after which a busy worker counts as hung, at least."""
STALL_FACTOR = 20.0
"""A worker may be silent for this many times its longest step or its longest silence so far."""
STOP_S = 2.0
"""Seconds that a worker gets to exit before it is killed, beside those that it may take to save."""


class LoadError(Exception):
    """The model was refused, or its process hung while loading. The message is one sentence."""


class LoadDied(LoadError):
    """The process ended while it loaded the model. The message follows "its process". The next try may succeed."""


def stall_limit(stall_s: float, longest_step_s: float, longest_silence_s: float) -> float:
    """Seconds of silence after which a busy worker counts as hung."""
    return max(stall_s, STALL_FACTOR * max(longest_step_s, longest_silence_s))


class _WorkerProtocol(asyncio.Protocol):
    """The server's end of the socket."""

    def __init__(
        self,
        on_messages: Callable[[list[wire.ToServer]], None],
        on_breach: Callable[[str], None],
        on_close: Callable[[], None],
    ) -> None:
        self._reader = wire.ServerReader()
        self._on_messages = on_messages
        self._on_breach = on_breach
        self._on_close = on_close

    def data_received(self, data: bytes) -> None:
        try:
            self._on_messages(self._reader.feed(data))
        except wire.WireError as error:
            self._on_breach(f"broke the protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_close()


class Worker:
    """A running worker process. `start` returns it with its model loaded."""

    def __init__(
        self, load: wire.Load, spawned: SpawnedWorker, stall_s: float, on_busy: Callable[[], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self.load = load
        self.ready: wire.Ready
        self.ended: asyncio.Future[str] = loop.create_future()
        """Done once the process is gone. The result says how it ended and follows "its process"."""
        self._process = spawned.process
        self._transport: asyncio.Transport
        self._protocol = _WorkerProtocol(self._receive, self._on_breach, self._on_close)
        self._sock = spawned.sock.dup()
        """For what the process sent last: a transport that fails to write does not read the rest."""
        self._on_busy = on_busy
        self._calls = PendingCalls(self._send_cancel, self._note_busy)
        self._busy_until = -math.inf
        """The time of the loop's clock when it was last busy; infinite while it is."""
        self.n_threads = 0
        """Threads that it was granted last; 0: never."""
        self._first: asyncio.Future[wire.Ready | wire.LoadFailed | None] = loop.create_future()
        """The first message; None if the process ended without one."""
        self._broken = False
        """It broke the protocol, so nothing it sends counts any more."""
        self._why = ""
        """The cause of the process's end, if this side caused it."""
        # the watchdog's
        self._stall_s = stall_s
        self._last_heard = 0.0
        self._longest_silence_s = 0.0
        self._longest_step_s = 0.0
        self._watchdog: asyncio.TimerHandle | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Requests can be sent, as far as is known."""
        return not (self.ended.done() or self._transport.is_closing())

    @property
    def n_open(self) -> int:
        """Requests that have not ended."""
        return len(self._calls.open)

    @property
    def most_threads(self) -> int:
        """See Sharer."""
        return self.load.n_threads

    def busy_since(self, time: float) -> bool:
        """It has a request that needs the processor, or had one after this time of the loop's clock."""
        return self.alive and self._busy_until > time

    def grant(self, n: int) -> None:
        """See Sharer."""
        if n != self.n_threads and self.alive:
            self.n_threads = n
            self._transport.write(wire.frame([wire.Threads(n)]))

    @property
    def n_running(self) -> int:
        """Requests that have a slot."""
        return sum(call.accepted for call in self._calls.open.values())

    # -- start and stop --------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        load: wire.Load,
        *,
        timeout: float,
        stall_s: float = STALL_S,
        spawned: SpawnedWorker | None = None,
        on_busy: Callable[[], None] = lambda: None,
    ) -> "Worker":
        """Starts a process, or takes over a spawned one, and loads the model.

        `on_busy` is called when it gets its first request, before that is sent, and when its last one has ended.

        Raises LoadError, or OSError if no process can be started; no process is left then.
        """
        if spawned is not None and spawned.load not in (None, load):
            spawned.close()
            spawned = None
        spawned = spawned or spawn_worker()
        self = cls(load, spawned, stall_s, on_busy)
        try:
            self._transport, _ = await asyncio.get_running_loop().create_unix_connection(
                lambda: self._protocol, sock=spawned.sock
            )
        except BaseException:
            self._sock.close()
            spawned.close()
            raise
        spawned.process.attach(on_line=self._on_stderr, on_exit=self._on_exit)
        if spawned.load is None:
            self._transport.write(wire.frame([load]))
        try:
            # not wait_for, which loses a cancel that comes together with the first message
            async with asyncio.timeout(timeout):
                first = await asyncio.shield(self._first)
        except TimeoutError:
            await self.stop()
            raise LoadError(f"loading took longer than {timeout:.0f} seconds") from None
        except asyncio.CancelledError:
            self._kill("is not needed any more")
            await self.stop()
            raise
        if not isinstance(first, wire.Ready):
            await asyncio.shield(self.ended)
            if isinstance(first, wire.LoadFailed):
                raise LoadError(first.message)
            raise LoadDied(self._why)
        self.ready = first
        self._watch()
        return self

    async def stop(self) -> None:
        """Ends the process, gently first, and waits until it is gone."""
        if not self.ended.done():
            self._why = self._why or "was stopped"
            limit = STOP_S + (wire.SAVE_S if self.load.cache_dir else 0.0)
            if not await self._process.stop(limit, self._send_shutdown):
                log.warning("%s: its process did not exit in time and was killed", self.load.name)
        self._transport.close()

    def hurry(self) -> None:
        """Ends the process now, although `stop` still waits for it."""
        if not self.ended.done():
            self._kill("was stopped")

    # -- requests --------------------------------------------------------------------------------

    def send(
        self,
        bodies: Mapping[int, wire.Body],
        queue: EventQueue,
        *,
        client: str = "",
        scope: str = "",
        group: str = "",
        deadline: float | None = None,
        sink: EventSink | None = None,
    ) -> list[PendingCall]:
        """Sends these bodies in one frame, and returns a call for each. Events go to `queue` with their keys."""
        if not self.n_open:
            self._last_heard = asyncio.get_running_loop().time()
        calls = [self._calls.begin(index, body, queue, sink) for index, body in bodies.items()]
        if not self.alive:
            for call in calls:
                self._calls.fail(call, "WorkerDied", "the model's process has ended")
            return calls
        requests = [
            wire.Request(id=call.id, body=body, client=client, scope=scope, group=group, deadline=deadline)
            for call, body in zip(calls, bodies.values(), strict=True)
        ]
        try:
            self._transport.write(wire.frame(requests))
        except wire.WireError as error:
            for call in calls:
                self._calls.fail(call, "PayloadTooLarge", str(error))
        return calls

    def cancel(self, calls: Iterable[PendingCall]) -> None:
        """Ends calls that nobody reads any more. Harmless for calls that have ended."""
        left = [call for call in calls if not call.ended]
        if left and not self._transport.is_closing():
            self._transport.write(wire.frame([wire.Cancel(call.id) for call in left]))
        for call in left:
            self._calls.fail(call, "Cancelled", "the client left")

    # -- inside ----------------------------------------------------------------------------------

    def _receive(self, messages: list[wire.ToServer]) -> None:
        now = self._clock()
        if now - self._last_heard > self._longest_silence_s and self._calls.open:
            self._longest_silence_s = now - self._last_heard
        self._last_heard = now
        for note in self._calls.receive(messages):
            if isinstance(note, wire.Heartbeat):
                self._longest_step_s = max(self._longest_step_s, note.max_step_s)
                continue
            if self._first.done():
                raise wire.WireError(f"a second {type(note).__name__}")
            if isinstance(note, wire.Ready):
                self._longest_step_s = note.max_step_s
            self._first.set_result(note)

    def _note_busy(self) -> None:
        self._busy_until = math.inf if self._calls.busy else self._clock()
        self._on_busy()

    def _send_cancel(self, call: PendingCall) -> None:
        if not self._transport.is_closing():
            self._transport.write(wire.frame([wire.Cancel(call.id)]))

    def _send_shutdown(self) -> None:
        if not self._transport.is_closing():
            self._transport.write(wire.frame([wire.Shutdown()]))

    def _on_breach(self, why: str) -> None:
        log.error("%s: its process %s", self.load.name, why)
        self._broken = True
        self._kill(why)
        self._transport.close()

    def _on_close(self) -> None:
        # most likely the process has ended, and its exit code says why better than this could
        loop = asyncio.get_running_loop()
        loop.call_later(STOP_S, lambda: None if self.ended.done() else self._kill("closed its socket"))

    def _kill(self, why: str) -> None:
        self._why = self._why or why
        self._process.kill()

    def _on_stderr(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip()
        level = logging.WARNING if text.startswith(subproc.WARNING) else logging.DEBUG
        log.log(level, "%s: %s", self.load.name, text.removeprefix(subproc.WARNING))

    def _on_exit(self, code: int) -> None:
        if not self._why or (code < 0 and code != -signal.SIGKILL):  # this side did not cause it
            self._why = subproc.describe_exit(code)
        if self._watchdog is not None:
            self._watchdog.cancel()
        # the exit may be seen before the last messages, and a request that was started must be known as such
        with self._sock, contextlib.suppress(OSError):
            while not self._broken and (data := self._sock.recv(1 << 16)):
                self._protocol.data_received(data)
        self._transport.close()
        self._calls.fail_all("WorkerDied", f"the model's process {self._why}")
        if not self._first.done():
            self._first.set_result(None)
        self.ended.set_result(self._why)

    def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        limit = stall_limit(self._stall_s, self._longest_step_s, self._longest_silence_s)
        if self._calls.open and loop.time() - self._last_heard > limit:
            log.error("%s: no sign of life for %.0f s; its process is killed", self.load.name, limit)
            self._kill(f"gave no sign of life for {limit:.0f} seconds")
            return
        self._watchdog = loop.call_later(min(1.0, self._stall_s / 4), self._watch)
