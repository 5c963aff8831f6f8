"""One worker process: starting it, speaking with it, noticing its end.

Owns the child process, its socket and the books on who waits for what: the law of the wire is kept
here whatever the process does, since every call gets its Failed from this side if the other cannot
give one. It knows no HTTP, and of a model only what Ready says.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections import deque
from collections.abc import Callable, Sequence

from tinyoai import wire
from tinyoai.host import subproc

log = logging.getLogger("tinyoai.worker")

STALL_S = 30.0
"""Seconds without a word from a busy worker after which it counts as hung."""
STALL_FACTOR = 20.0
"""A worker that was once silent for t seconds may be silent for this many times t."""
STOP_S = 2.0
"""Seconds a worker has to leave by itself before it is killed."""

Make = Callable[[int], wire.Ask]
"""Builds a question for the id that it is given."""
Take = Callable[[wire.Delta], bool]
"""Takes a piece of an answer as it comes in, past the queue and the task behind it; false: not now, queue it."""


class LoadError(Exception):
    """The model was refused, or its process hung while loading: one sentence why."""


class LoadDied(LoadError):
    """The process ended while loading: a few words why. It may well load the next time."""


class Call:
    """One question on its way: its events in order. Iterate over it; `cancel` when nobody listens."""

    __slots__ = ("_cancel", "_events", "_waiter", "accepted", "ended", "id", "take")

    def __init__(self, call_id: int, cancel: Callable[["Call"], None]) -> None:
        self.id = call_id
        self.take: Take | None = None
        self.accepted = False
        self.ended = False
        """The last event has come in, though it may not have been taken yet."""
        self._cancel = cancel
        self._events: deque[wire.Event] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Call":
        return self

    async def __anext__(self) -> wire.Event:
        while not self._events:
            if self.ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._events.popleft()

    def cancel(self) -> None:
        """Nobody listens any more. Harmless at any time, any number of times."""
        if not self.ended:
            self._cancel(self)

    def put(self, event: wire.Event) -> None:
        """One more event, from the books alone."""
        if type(event) is wire.Delta:
            # nothing may overtake what is queued
            if self.take is not None and not self._events and self.take(event):
                return
        elif isinstance(event, wire.Accepted):
            self.accepted = True
        elif isinstance(event, wire.Last):
            self.ended = True
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Books:
    """Which calls are open. Holds every message against the law; pure, so that a test can drive it."""

    def __init__(self) -> None:
        self.open: dict[int, Call] = {}
        self._last_id = 0

    def begin(self, cancel: Callable[[Call], None]) -> Call:
        """A new call with the next id."""
        self._last_id += 1
        call = Call(self._last_id, cancel)
        self.open[call.id] = call
        return call

    def receive(self, event: wire.Event) -> None:
        """Gives an event to its call. Raises wire.WireError for one that breaks the law."""
        call = self.open.get(event.id)
        if call is None:
            if not 0 < event.id <= self._last_id:
                raise wire.WireError(f"an answer to call {event.id}, which was never made")
            # ended on this side already by cancel; only its last words may still be on the way
            return
        if call.accepted:
            if type(event) is wire.Accepted:
                raise wire.WireError(f"call {event.id} was accepted twice")
        elif isinstance(event, wire.Delta | wire.Vector | wire.Done):
            raise wire.WireError(f"call {event.id} is answered before it was accepted")
        call.put(event)
        if call.ended:
            del self.open[event.id]

    def drop(self, call: Call, message: str) -> None:
        """Ends one call from this side."""
        if self.open.pop(call.id, None) is not None:
            call.put(wire.Failed(id=call.id, kind="Cancelled", message=message))

    def fail_all(self, message: str) -> None:
        """Ends every open call: the worker is gone."""
        calls, self.open = self.open, {}
        for call in calls.values():
            call.put(wire.Failed(id=call.id, kind="WorkerDied", message=message))


class _Line(asyncio.Protocol):
    """The server's end of the socket."""

    def __init__(
        self,
        on_messages: Callable[[list[wire.ToServer]], None],
        on_breach: Callable[[str], None],
        on_end: Callable[[], None],
    ) -> None:
        self._reader = wire.ServerReader()
        self._on_messages = on_messages
        self._on_breach = on_breach
        self._on_end = on_end

    def data_received(self, data: bytes) -> None:
        try:
            self._on_messages(self._reader.feed(data))
        except wire.WireError as error:
            self._on_breach(f"spoke out of turn: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()


class Worker:
    """A running worker process with a loaded model."""

    def __init__(self, load: wire.Load, stall_s: float) -> None:
        # what it is
        self.load = load
        self.ready: wire.Ready
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Done once the process is gone: why, in a few words."""
        # how it is spoken with
        self._process: asyncio.subprocess.Process
        self._transport: asyncio.Transport
        self._books = Books()
        self._first: asyncio.Future[wire.ToServer | None] = asyncio.get_running_loop().create_future()
        """Its first word; None if it ended without one."""
        self._tasks: set[asyncio.Task[None]] = set()
        # the watchdog's
        self._stall_s = stall_s
        self._heard = 0.0
        self._longest = 0.0
        self._why = ""

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """It can be spoken with, as far as is known."""
        return not (self.ended.done() or self._transport.is_closing())

    @property
    def n_open(self) -> int:
        """Calls not yet ended."""
        return len(self._books.open)

    @property
    def n_running(self) -> int:
        """Of these, how many have a slot."""
        return sum(call.accepted for call in self._books.open.values())

    @classmethod
    async def start(cls, load: wire.Load, *, timeout: float, stall_s: float = STALL_S) -> "Worker":
        """Starts the process and loads the model. Raises LoadError; leaves nothing behind then."""
        self = cls(load, stall_s)
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *subproc.PYTHON,
                "-m",
                "tinyoai.engine",
                str(theirs.fileno()),
                env=subproc.environment(),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
            )
        ours.setblocking(False)
        self._transport, _ = await loop.create_unix_connection(
            lambda: _Line(self._receive, self._broke_the_law, self._closed), sock=ours
        )
        self._spawn(self._read_stderr())
        self._spawn(self._watch())
        self._transport.write(wire.frame([load]))
        try:
            # not wait_for, which loses a cancel that comes together with the first word
            async with asyncio.timeout(timeout):
                first = await asyncio.shield(self._first)
        except TimeoutError:
            await self.stop()
            raise LoadError(f"loading took longer than {timeout:.0f} seconds and was given up") from None
        except asyncio.CancelledError:
            self._kill("not wanted any more")
            raise
        if not isinstance(first, wire.Ready):
            await self.ended
            if isinstance(first, wire.LoadFailed):
                raise LoadError(first.message)
            raise LoadDied(self._why)
        self.ready = first
        return self

    def call(self, make: Make) -> Call:
        """Sends what `make` builds for a call id, and returns the call."""
        return self.calls([make])[0]

    def calls(self, makes: Sequence[Make]) -> list[Call]:
        """The same for many: they leave in one frame."""
        if not self.n_open:
            self._heard = asyncio.get_running_loop().time()
        calls = [self._books.begin(self._cancel) for _ in makes]
        if not self.alive:
            self._books.fail_all("the model's process has ended")
            return calls
        try:
            self._transport.write(
                wire.frame([make(call.id) for make, call in zip(makes, calls, strict=True)])
            )
        except wire.WireError as error:
            for call in calls:
                self._books.receive(wire.Failed(id=call.id, kind="PayloadTooLarge", message=str(error)))
        return calls

    def cancel(self, calls: Sequence[Call]) -> None:
        """Nobody listens to these any more. Harmless for calls that have ended."""
        left = [call for call in calls if not call.ended]
        if left and not self._transport.is_closing():
            self._transport.write(wire.frame([wire.Cancel(call.id) for call in left]))
        for call in left:
            self._books.drop(call, "the client left")

    async def stop(self) -> None:
        """Ends the process, gently first, and waits until it is gone."""
        if not self.ended.done():
            self._why = self._why or "was told to leave"
            if not self._transport.is_closing():
                self._transport.write(wire.frame([wire.Shutdown()]))
            # not asyncio.timeout, which Python 3.11.2, Debian's, loses on a task that was cancelled, as this may be
            await asyncio.wait({self.ended}, timeout=STOP_S)
            if not self.ended.done():
                self._kill("did not leave when told to")
        # not for ever: where all tasks are being cancelled, nobody is left to see the end
        await asyncio.wait({self.ended}, timeout=STOP_S)
        self._transport.close()

    # -- inside ----------------------------------------------------------------------------------

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _receive(self, messages: list[wire.ToServer]) -> None:
        now = asyncio.get_running_loop().time()
        if self.n_open:
            self._longest = max(self._longest, now - self._heard)
        self._heard = now
        for message in messages:
            if type(message) is wire.Delta:  # almost all are, and isinstance takes three times as long
                self._books.receive(message)
            elif isinstance(message, wire.Ready | wire.LoadFailed):
                if not self._first.done():
                    self._first.set_result(message)
            elif not isinstance(message, wire.Beat):
                self._books.receive(message)

    def _cancel(self, call: Call) -> None:
        self.cancel([call])

    def _broke_the_law(self, why: str) -> None:
        log.error("%s: its process %s", self.load.name, why)
        self._transport.close()
        self._kill(why)

    def _closed(self) -> None:
        # most likely the process has ended, and its exit code says why better than this could
        loop = asyncio.get_running_loop()
        loop.call_later(STOP_S, lambda: None if self.ended.done() else self._kill("closed its socket"))

    def _kill(self, why: str) -> None:
        self._why = self._why or why
        with contextlib.suppress(ProcessLookupError):  # gone already
            self._process.kill()

    async def _read_stderr(self) -> None:
        try:
            self._end(await self._until_exit())
        except asyncio.CancelledError:
            # the loop is being closed over it: nobody would see its end, and who waits for that must not for ever
            self._kill("was left behind")
            self._end(-signal.SIGKILL)
            raise

    async def _until_exit(self) -> int:
        """Logs what the process says on stderr until it has ended; its exit code, negative for a signal."""
        stderr = self._process.stderr
        while stderr is not None:
            try:
                line = await stderr.readline()
            except ValueError:  # a line beyond the reader's limit; it has been dropped
                continue
            if not line:
                break
            log.debug("%s: %s", self.load.name, line.decode("utf-8", "replace").rstrip())
        return await self._process.wait()

    def _end(self, code: int) -> None:
        if not self._why or (code < 0 and code != -signal.SIGKILL):  # it did not end by what was done to it
            self._why = subproc.ended(code)
        self._transport.close()
        message = f"the model's process {self._why}"
        if not self._first.done():
            self._first.set_result(None)
        self._books.fail_all(message)
        if not self.ended.done():
            self.ended.set_result(self._why)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while not self.ended.done():
            await asyncio.sleep(min(1.0, self._stall_s / 4))
            allowed = max(self._stall_s, STALL_FACTOR * self._longest)
            if self.n_open and loop.time() - self._heard > allowed:
                log.error("%s: no sign of life for %.0f s; ending its process", self.load.name, allowed)
                self._kill(f"gave no sign of life for {allowed:.0f} seconds")
                return
