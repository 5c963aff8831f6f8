"""The worker program: `python -m tinyoai.engine <fd>`, one loaded model behind a socket.

Three threads: the reader takes frames in, the tokenizer prepares requests, the main thread steps the scheduler
and sends frames. The process exits when its socket closes. Exit codes: 0 stopped, 3 the model was refused.
"""

import contextlib
import ctypes
import faulthandler
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import NoReturn

from tinyoai import native, wire
from tinyoai.engine import rendering, requests, saving, tokenization
from tinyoai.engine.contract import Engine, EngineError
from tinyoai.engine.model_key import ModelKey
from tinyoai.engine.opening import open_engine
from tinyoai.engine.rendering import ChatRenderer
from tinyoai.engine.scheduler import Scheduler
from tinyoai.engine.tasks import Task
from tinyoai.host import memory, subproc

REFUSED = 3
OOM_SCORE = 500
"""The kernel ends a worker before the server, which can start another."""
HEARTBEAT_S = 1.0
"""Seconds of silence after which a running loop sends a Heartbeat."""
CALIBRATE_AFTER_S = 0.5
"""Idle seconds before the cost of steps with several rows is measured, one number of rows at a time."""
TOKENIZER_STACK = 256 << 20
"""Bytes. Regular expressions of tokenizers recurse; unused stack costs no memory."""
MAX_PREPARING = 2
"""Requests given to the tokenizer thread at once: one in work, one ready. More would be lost if it crashed."""

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent ends, even while this process is stopped."""

Prepared = tuple[int, list[Task] | wire.Failed]
Item = wire.Request | wire.Cancel | wire.Shutdown | wire.Threads | Prepared | tokenization.Result
"""A piece of work for the main thread."""


def _make_expendable() -> None:
    """Makes this process end with the server, and the first one to be killed when memory is short."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    subproc.isolate(OOM_SCORE)
    faulthandler.enable()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy needs no threads of its own


class Worker:
    """The three threads' shared state: an inbox of the main thread, and one of the tokenizer."""

    def __init__(
        self, sock: socket.socket, engine: Engine, load: wire.Load, key: ModelKey | None = None
    ) -> None:
        """Raises ModelRefused for a chat template that cannot be used."""
        self._sock = sock
        self._engine = engine
        self._renderer = ChatRenderer(load, engine)
        self._inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._to_tokenizer: queue.SimpleQueue[wire.Request] = queue.SimpleQueue()
        self._n_preparing = 0
        self._text_requests: deque[wire.Request] = deque()
        """Tokenize and Detokenize that have not started."""
        store, disk = saving.open_tiers(load, engine, key)
        self._scheduler = Scheduler(
            engine,
            n_queue=load.n_queue,
            clock=time.monotonic,
            queue_timeout_s=load.queue_timeout_s,
            store=store,
            disk=disk,
        )
        self._saving = saving.Saving(self._scheduler.prefixes)
        self._active_at = time.monotonic()
        """The last time that there was something to do."""

    def ready(self) -> wire.Ready:
        """The answer to Load."""
        engine = self._engine
        return wire.Ready(
            info=engine.info,
            n_slots=engine.caps.n_seq,
            n_cells=engine.caps.n_kv if engine.caps.shares_cells else 0,
            n_threads=engine.n_threads,
            version=f"{engine.info.engine}-{engine.info.engine_version}/{native.VERSION}",
            template=self._renderer.name,
            max_step_s=self._scheduler.max_step_s,
            resident_bytes=memory.resident(os.getpid()),
            reproducible=engine.caps.bit_exact,
        )

    # -- the reader thread -----------------------------------------------------------------------

    def read(self, reader: wire.WorkerReader, messages: Iterable[wire.ToWorker]) -> None:
        """Never returns: the process exits with the socket."""
        while True:
            for message in messages:
                if isinstance(message, wire.Request | wire.Cancel | wire.Threads):
                    self._inbox.put(message)
                    if isinstance(message, wire.Cancel):
                        self._scheduler.interrupt(message.id)
                elif isinstance(message, wire.Shutdown):
                    self._begin_shutdown()
            messages = _receive(self._sock, reader)

    def _begin_shutdown(self) -> None:
        """Lets the main thread save, for a limited time; without anything to save the process ends at once."""
        if not self._scheduler.prefixes.on_disk:
            os._exit(0)
        end = threading.Timer(wire.SAVE_S, os._exit, (0,))
        end.daemon = True
        end.start()
        self._inbox.put(wire.Shutdown())
        self._engine.interrupt()

    # -- the tokenizer thread --------------------------------------------------------------------

    def tokenize(self) -> None:
        """Prepares requests one after the other."""
        while True:
            request = self._to_tokenizer.get()
            if isinstance(request.body, wire.Tokenize | wire.Detokenize):
                self._inbox.put(tokenization.answer(request, self._engine, self._renderer))
            else:
                self._inbox.put((request.id, requests.prepare(request, self._engine, self._renderer)))

    # -- the main thread -------------------------------------------------------------------------

    def run(self) -> None:
        """The step loop. Raises OSError when the socket closes."""
        scheduler, inbox, sock = self._scheduler, self._inbox, self._sock
        last_sent = time.monotonic()
        while True:
            out: list[wire.ToServer] = []
            if not scheduler.runnable:
                out += self._wait()
            else:
                self._active_at = time.monotonic()
            while not inbox.empty():
                out += self._take(inbox.get())
            if (self._text_requests or scheduler.arrivals) and (start := self._start()):
                # Started must be on its way before any native call for the request
                out += [wire.Started(request.id) for request in start]
                sock.sendall(wire.frame(out))
                last_sent = time.monotonic()
                for request in start:
                    self._to_tokenizer.put(request)
                out = []
            out += scheduler.step()
            if out:
                sock.sendall(wire.frame(out))
                last_sent = time.monotonic()
            elif time.monotonic() - last_sent > HEARTBEAT_S:
                sock.sendall(wire.frame([wire.Heartbeat(scheduler.max_step_s)]))
                last_sent = time.monotonic()

    def _wait(self) -> list[wire.ToServer]:
        """Waits for a message; with requests open, not longer than the next heartbeat."""
        now = time.monotonic()
        busy = self._n_preparing or self._text_requests or not self._scheduler.idle
        if busy:
            self._active_at = now
        try:
            item = self._inbox.get(timeout=HEARTBEAT_S / 2 if busy else self._work_due_in(now))
        except queue.Empty:
            if not busy:
                self._work_while_idle()
            return []
        self._active_at = time.monotonic()
        return self._take(item)

    def _work_due_in(self, now: float) -> float | None:
        """Seconds until there is work that a request would interrupt; None: there is none."""
        saving = self._saving.due_in(now - self._active_at)
        if not self._scheduler.calibration.sizes:
            return saving
        return CALIBRATE_AFTER_S if saving is None else min(CALIBRATE_AFTER_S, saving)

    def _work_while_idle(self) -> None:
        if self._scheduler.calibration.sizes:
            self._scheduler.calibration.measure()
        else:
            self._saving.work(time.monotonic() - self._active_at, self._inbox.empty)

    def _shut_down(self) -> NoReturn:
        """Saves what is not on disk, and ends the process."""
        until = time.monotonic() + wire.SAVE_S - 1.0
        self._saving.finish(lambda: time.monotonic() < until)
        os._exit(0)

    def _take(self, item: Item) -> list[wire.ToServer]:
        if isinstance(item, wire.Request):
            if isinstance(item.body, wire.NeedsSlot):
                return self._scheduler.submit(item)
            self._text_requests.append(item)
            return []
        if isinstance(item, wire.Shutdown):
            self._shut_down()
        if isinstance(item, wire.Cancel):
            waiting = next((r for r in self._text_requests if r.id == item.id), None)
            if waiting is None:
                return self._scheduler.cancel(item.id)
            self._text_requests.remove(waiting)
            return [wire.Failed(id=item.id, kind="Cancelled", message="the client disconnected")]
        if isinstance(item, wire.Threads):
            self._engine.limit_threads(max(1, item.n))
            return []
        self._n_preparing -= 1
        if isinstance(item, tuple):
            return self._scheduler.prepared(*item)
        return [item] if isinstance(item, wire.Failed) else [item, wire.Done(id=item.id)]

    def _start(self) -> list[wire.Request]:
        """The requests to start now."""
        found: list[wire.Request] = []
        while self._n_preparing < MAX_PREPARING:
            if self._text_requests:
                request = self._text_requests.popleft()
            elif (queued := self._scheduler.next_to_prepare()) is not None:
                request = queued.request
            else:
                break
            self._n_preparing += 1
            found.append(request)
        return found


def _receive(sock: socket.socket, reader: wire.WorkerReader) -> list[wire.ToWorker]:
    try:
        data = sock.recv(1 << 16)
    except ConnectionError:
        data = b""
    if not data:
        os._exit(0)
    return reader.feed(data)


def main(fd: int) -> int:
    """Serves one model on the socket `fd` until it closes; returns the exit code."""
    _make_expendable()
    sock = socket.socket(fileno=fd)
    sock.setblocking(True)
    reader = wire.WorkerReader()
    messages: list[wire.ToWorker] = []
    while not messages:
        messages = _receive(sock, reader)
    load = messages.pop(0)
    if not isinstance(load, wire.Load):
        raise wire.WireError("the first message must be Load")
    if load.engine == "llamacpp":
        # the native load holds no interpreter lock, so these imports cost no time beside it
        threading.Thread(target=rendering.preload, daemon=True).start()
    key = saving.begin(load)
    try:
        worker = Worker(sock, open_engine(load), load, key)
    except EngineError as error:
        sock.sendall(wire.frame([wire.LoadFailed(message=str(error))]))
        return REFUSED
    sock.sendall(wire.frame([worker.ready()]))
    threading.Thread(target=worker.read, args=(reader, messages), daemon=True).start()
    threading.stack_size(TOKENIZER_STACK)
    threading.Thread(target=worker.tokenize, daemon=True).start()
    threading.stack_size(0)
    # a broken pipe: the server is gone, and with it every client
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.run()
    return 0


if __name__ == "__main__":
    # no finalizers: the libraries' threads may still be in a call, and the kernel frees everything
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)
