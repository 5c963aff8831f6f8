"""The worker program: `python -m tinyoai.engine <fd>`, one loaded model behind a socket.

Owns the process: its socket, its two threads and its way out. The reader thread takes frames in and
tokenizes; the main thread steps the scheduler and sends what each step brought as one frame. It
must not know how tokens are chosen or answers are worded for clients. End of the socket is the end
of the process, at once. Exit codes: 0 told to leave or the server left, 3 the model was refused.
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
from collections.abc import Iterable

from tinyoai import native, wire
from tinyoai.engine import threads, tokenization
from tinyoai.engine.contract import Engine, EngineError
from tinyoai.engine.scheduler import Job, Scheduler, prepare
from tinyoai.host import subproc

REFUSED = 3
OOM_SCORE = 500
"""Before the server, which can start another."""
BEAT_S = 1.0
"""Seconds of silence after which a busy loop says that it lives."""

_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal to get when the parent ends, even while this process is stopped."""


def _settle() -> None:
    """Makes this process safe to lose: it dies with the server, first when memory is short."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    subproc.settle(OOM_SCORE)
    faulthandler.enable()
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's own threads would have nothing to do here


def _open(load: wire.Load) -> Engine:
    """Raises EngineError with one sentence for the user."""
    if load.engine == "fake":
        from tinyoai.engine.fake import FakeEngine

        return FakeEngine(name=load.name, n_ctx=load.n_ctx, n_slots=load.n_slots, n_batch=load.n_batch)
    from tinyoai.engine.ctransformers.engine import open_model

    return open_model(
        load.path,
        model_type=load.model_type,
        name=load.name,
        n_ctx=load.n_ctx,
        n_slots=load.n_slots,
        n_batch=load.n_batch,
        gpu_layers=load.n_gpu_layers,
        pooling=load.pooling,
    )


def _ready(engine: Engine, n_threads: int) -> wire.Ready:
    info = engine.info
    control = {token: text for text, token in info.special.items()}
    return wire.Ready(
        name=info.name,
        architecture=info.architecture,
        quantization=info.quantization,
        engine=info.engine,
        n_params=info.n_params,
        n_vocab=info.n_vocab,
        n_ctx=info.n_ctx,
        n_ctx_train=info.n_ctx_train,
        n_embd=info.n_embd,
        n_slots=engine.n_slots,
        n_batch=engine.n_batch,
        n_threads=n_threads,
        file_size=info.file_size,
        special=sorted(info.special),
        chat_template=info.chat_template,
        version=f"{info.engine}/{native.VERSION}",
        n_embd_out=info.n_embd_out,
        pooling=info.pooling,
        bos=control.get(info.bos_id, ""),
        eos=control.get(info.eos_id, ""),
    )


class Worker:
    """The two threads' meeting place: an inbox of prepared jobs, ready answers and cancels."""

    def __init__(self, sock: socket.socket, engine: Engine, n_threads: int, load: wire.Load) -> None:
        self._sock = sock
        self._engine = engine
        self._inbox: queue.SimpleQueue[Job | wire.Last | wire.Cancel] = queue.SimpleQueue()
        self._scheduler = Scheduler(
            engine, n_threads=n_threads, n_queue=load.n_queue, clock=time.monotonic, wait_s=load.wait_s
        )

    def read(self, reader: wire.WorkerReader, messages: Iterable[wire.ToWorker]) -> None:
        """The reader thread: never returns, the process ends with the socket."""
        while True:
            for message in messages:
                if isinstance(message, wire.Ask):
                    self._inbox.put(self._prepare(message))
                elif isinstance(message, wire.Cancel):
                    self._inbox.put(message)
                elif isinstance(message, wire.Shutdown):
                    os._exit(0)
            messages = _receive(self._sock, reader)

    def _prepare(self, request: wire.Ask) -> Job | wire.Last:
        try:
            if isinstance(request, wire.Tokenize):
                return tokenization.tokenize(request, self._engine)
            if isinstance(request, wire.Detokenize):
                return tokenization.detokenize(request, self._engine)
            return prepare(request, self._engine)
        except Exception as error:  # one request's fault must not end the thread that serves all
            print(f"request {request.id}: {type(error).__name__}: {error}", file=sys.stderr)
            return wire.Failed(id=request.id, kind="InternalError", message="the prompt could not be read")

    def run(self) -> None:
        """The step loop."""
        scheduler, inbox = self._scheduler, self._inbox
        last_sent = time.monotonic()
        while True:
            out: list[wire.ToServer] = []
            while scheduler.idle or not inbox.empty():
                out += self._take(inbox.get())
                if out and scheduler.idle:
                    break
            out += scheduler.step()
            now = time.monotonic()
            if not out and now - last_sent > BEAT_S:
                out.append(wire.Beat())
            if out:
                self._sock.sendall(wire.frame(out))
                last_sent = now

    def _take(self, item: Job | wire.Last | wire.Cancel) -> list[wire.ToServer]:
        if isinstance(item, Job):
            return self._scheduler.submit(item)
        if isinstance(item, wire.Cancel):
            return self._scheduler.cancel(item.id)
        return [item]


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
    _settle()
    sock = socket.socket(fileno=fd)
    sock.setblocking(True)
    reader = wire.WorkerReader()
    messages: list[wire.ToWorker] = []
    while not messages:
        messages = _receive(sock, reader)
    load = messages.pop(0)
    if not isinstance(load, wire.Load):
        raise wire.WireError("the first message must be Load")
    try:
        engine = _open(load)
        n_threads = load.n_threads or threads.measure(engine)
    except EngineError as error:
        sock.sendall(wire.frame([wire.LoadFailed(message=str(error))]))
        return REFUSED
    sock.sendall(wire.frame([_ready(engine, n_threads)]))
    worker = Worker(sock, engine, n_threads, load)
    threading.Thread(target=worker.read, args=(reader, messages), daemon=True).start()
    # a broken pipe: the server is gone, and with it everyone who waits for an answer
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        worker.run()
    return 0


if __name__ == "__main__":
    # no finalizers: the libraries' threads may still be in a call, and the kernel frees everything
    code = main(int(sys.argv[1]))
    sys.stderr.flush()
    os._exit(code)
