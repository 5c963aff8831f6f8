"""The scheduler: queued requests, slots, the rows of each step, and time.

It knows an engine only by its contract, a task only by its protocol, and nothing of text. One step evaluates one
token of each decoding task and prompt tokens of prefilling ones; its messages are returned together. Every
request ends in exactly one Done or Failed. Not thread-safe: one loop owns it.
"""

import math
import sys
from collections import deque
from collections.abc import Callable, Sequence

from tinyoai import wire
from tinyoai.engine.batching import Batch, Batching, Running
from tinyoai.engine.calibration import Calibration
from tinyoai.engine.contract import Engine, EngineError, Interrupted, NoRoom, Partial, Row
from tinyoai.engine.disk_cache import DiskCache
from tinyoai.engine.prefix_cache import PrefixCache
from tinyoai.engine.prefix_reuse import Assignment
from tinyoai.engine.prefix_store import PrefixStore
from tinyoai.engine.queue import FairQueue
from tinyoai.engine.requests import QueuedRequest
from tinyoai.engine.room import Room
from tinyoai.engine.sequences import Sequences
from tinyoai.engine.tasks import Outputs, Task, TaskFailed

FIRST_SLOT_S = 1.0
"""Seconds that a request is expected to hold a slot, until one has ended."""
MAX_RETRY_S = 120.0
"""The longest wait that is advised; the SDKs ignore longer ones."""
STARTED_BY_S = 5.0
"""A queued request is prepared after this long at the latest, so that its client hears that it is valid."""


class Scheduler:
    """Continuous batching over an engine's sequences."""

    def __init__(
        self,
        engine: Engine,
        *,
        n_queue: int,
        clock: Callable[[], float],
        queue_timeout_s: float = math.inf,
        store: PrefixStore | None = None,
        disk: DiskCache | None = None,
    ) -> None:
        self._engine = engine
        self._caps = engine.caps
        self._clock = clock
        self._queue_timeout_s = queue_timeout_s
        self._sequences = Sequences(engine)
        self._slots = self._sequences.slots
        self.prefixes = PrefixCache(engine, self._sequences, store, disk)
        self._queue: FairQueue[QueuedRequest] = FairQueue(n_queue)
        self._requests: dict[int, QueuedRequest] = {}
        """All that have not ended, by id."""
        self.arrivals: deque[QueuedRequest] = deque()
        """In the order of arrival, until they are started."""
        self._started: set[int] = set()
        """Started requests that wait for a slot."""
        self._running: list[Running] = []
        self._room = Room(self._sequences, engine.caps, self._running)
        self._mean_slot_s = FIRST_SLOT_S
        """Mean seconds that requests hold a slot, newer ones weighted more."""
        self._assigned = 0
        self._batching = Batching(engine.caps)
        self.calibration = Calibration(
            engine,
            self._sequences,
            self._batching.decode_cost,
            clock,
            may_evict=store is not None and store.in_memory,
        )
        self._prefilling: frozenset[int] = frozenset()
        """Requests with prompt tokens in the running eval."""

    @property
    def idle(self) -> bool:
        """No request is queued or running."""
        return not self._requests

    @property
    def max_step_s(self) -> float:
        """The longest step to expect, in seconds."""
        return self._batching.cost.max_step_s

    @property
    def runnable(self) -> bool:
        """A step has something to do: a task runs, or a prepared one can get a slot."""
        return bool(self._running or self._room.paused) or self._queue.first(QueuedRequest.ready) is not None

    # -- requests ----------------------------------------------------------------------------------

    def submit(self, request: wire.Request) -> list[wire.ToServer]:
        """Queues a request; or returns its Failed if the queue is full."""
        now = self._clock()
        deadline = math.inf if request.deadline is None else request.deadline
        queued = QueuedRequest(request, now, min(now + self._queue_timeout_s, deadline), deadline)
        n_free = sum(not slot.busy for slot in self._slots)
        if not self._queue.push(queued, n_free):
            seconds = self.wait_estimate()
            message = (
                f"the queue for this model is full ({self._queue.n_requests} waiting); try again in about "
                f"{seconds:.0f} second{'' if seconds < 1.5 else 's'}"
            )
            return [wire.Failed(id=request.id, kind="Overloaded", message=message, retry_after=seconds)]
        self._requests[request.id] = queued
        self.arrivals.append(queued)
        return []

    def next_to_prepare(self) -> QueuedRequest | None:
        """The next queued request to prepare, which counts as started from here on; None: none yet.

        A started request is lost if the worker dies, so only as many are started as will soon have a slot.
        """
        arrivals = self.arrivals
        while arrivals and (arrivals[0].started or arrivals[0].id not in self._requests):
            arrivals.popleft()
        if not arrivals:
            return None
        if len(self._started) < len(self._slots):
            # in the order of turns: no more than the started ones come before the first that is not
            queued = next(q for q in self._queue if not q.started)
        elif self._clock() - arrivals[0].queued_at >= STARTED_BY_S:
            queued = arrivals.popleft()
        else:
            return None
        queued.started = True
        self._started.add(queued.id)
        return queued

    def prepared(self, request_id: int, result: list[Task] | wire.Failed) -> list[wire.ToServer]:
        """Takes the tasks of a request, or its refusal. A request that ended meanwhile is ignored."""
        queued = self._requests.get(request_id)
        if queued is None:
            return []
        if isinstance(result, wire.Failed):
            self._end(queued)
            return [result]
        queued.tasks.extend(result)
        queued.first = result[0]
        queued.n_open = len(result)
        queued.n_prompt = len(result[0].ids)
        return [wire.Queued(request_id, queued.n_prompt)]

    def cancel(self, request_id: int) -> list[wire.ToServer]:
        """Ends a request at once; its slots are free and keep their prefixes. Unknown ids are ignored."""
        queued = self._requests.get(request_id)
        if queued is None:
            return []
        self._end(queued)
        return [wire.Failed(id=request_id, kind="Cancelled", message="the client disconnected")]

    def interrupt(self, request_id: int) -> None:
        """Ends the running eval early if it has prompt tokens of this request. Safe in any thread."""
        if request_id in self._prefilling:
            self._engine.interrupt()

    def wait_estimate(self) -> float:
        """Seconds until a new request would get a slot, from how long the last ones held theirs."""
        n_ahead = self._queue.n_requests + 1
        return min(MAX_RETRY_S, max(1.0, n_ahead * self._mean_slot_s / len(self._slots)))

    # -- a step ------------------------------------------------------------------------------------

    def step(self) -> list[wire.ToServer]:
        """Gives out free slots, evaluates one batch and returns its messages."""
        out: list[wire.ToServer] = []
        if self._room.paused:
            self._resume(out)
        if len(self._queue):
            self._expire(out)
            self._admit(out)
        batch, rows, n_prefill = self._select()
        if not batch:
            return out
        started = self._clock()
        try:
            self._evaluate(batch, rows, n_prefill)
        except Interrupted:
            self._cut_late(batch, out)
            return out
        except NoRoom:
            self._make_room(batch, out)
            return out
        except Partial as partial:
            self._on_partial(batch, rows, partial, out)
            return out
        except EngineError as error:
            self._on_engine_error(batch, rows, error, out)
            return out
        now = self._clock()
        for index, running in enumerate(batch):
            self._on_eval(running, rows[index], index, now, out)
        self._batching.account(n_prefill, sum(len(row.tokens) for row in rows) - n_prefill, now - started)
        return out

    def _select(self) -> Batch:
        """The next batch. Idle sequences, and then the newest tasks, leave the KV cells that it needs."""
        batch = self._batching.select(self._running)
        while not self._room.make(sum(len(row.tokens) for row in batch.rows)):
            self._room.pause_newest()
            batch = self._batching.select(self._running)
        return batch

    def _evaluate(self, batch: Sequence[Running], rows: Sequence[Row], n_prefill: int) -> None:
        """Evaluates rows; only prompts are worth an interrupt."""
        if not (n_prefill and self._caps.interrupts):
            self._engine.eval(rows)
            return
        until = min(running.request.deadline for running in batch)
        self._prefilling = frozenset(r.request.id for r in batch if r.task.prefilling)
        try:
            self._engine.eval(rows, 0.0 if until == math.inf else until)
        finally:
            self._prefilling = frozenset()

    # -- slots -------------------------------------------------------------------------------------

    def _expire(self, out: list[wire.ToServer]) -> None:
        now = self._clock()
        for late in self._queue.expired(now):
            message = f"timed out after {now - late.queued_at:.1f} s in the queue"
            failed = wire.Failed(
                id=late.id,
                kind="RequestTimeout",
                message=message,
                code="queue_timeout",
                retry_after=self.wait_estimate(),
            )
            if late.accepted:  # some of its choices run: they go on, and the others end as they are
                for task in late.tasks:
                    out.extend(self._cut_unstarted(late, task, now))
                late.tasks.clear()
                self._started.discard(late.id)
                self._finish(late, out)
            else:
                self._end(late)
                out.append(failed)

    def _cut_unstarted(self, queued: QueuedRequest, task: Task, now: float) -> list[wire.ToServer]:
        try:
            task.start(-1, 0, now)
            return task.cut_short(now)
        except TaskFailed:
            return []
        finally:
            queued.n_open -= 1

    def _admit(self, out: list[wire.ToServer]) -> None:
        while (queued := self._queue.first(QueuedRequest.ready)) is not None:
            task = queued.tasks[0]
            if self._room.waits(task):
                return
            assignment = self.prefixes.assign(task, queued.request.scope)
            if assignment is None or not self._room.fits(task, assignment):
                return
            self._queue.pop(queued)
            queued.tasks.popleft()
            if queued.tasks:
                self._queue.push_front(queued)
            else:
                self._started.discard(queued.id)
            self._start(queued, task, assignment, out)

    def _start(
        self, queued: QueuedRequest, task: Task, assignment: Assignment, out: list[wire.ToServer]
    ) -> None:
        scope = queued.request.scope
        task.cache_miss = self.prefixes.seen(task, scope)
        slot, n_keep = self.prefixes.place(assignment, task, scope)
        now = self._clock()
        if not queued.accepted:
            queued.accepted = True
            queued.n_cached = n_keep
            queued.queue_ms = (now - queued.queued_at) * 1000.0
            out.append(
                wire.Accepted(
                    id=queued.id,
                    n_prompt=queued.n_prompt,
                    n_cached=n_keep,
                    cache_miss=task.cache_miss,
                    queue_ms=queued.queue_ms,
                )
            )
        try:
            out.extend(task.start(slot.index, n_keep, now))
        except TaskFailed as error:
            self._fail(queued, error, out)
            return
        self._assigned += 1
        slot.busy, slot.last_used = True, self._assigned
        self._running.append(Running(queued, task, slot, now))

    def _release(self, running: Running, *, spoiled: bool = False) -> None:
        if self._room.forget(running):
            return  # it was paused and has no slot
        self._running.remove(running)
        self._mean_slot_s += 0.2 * (self._clock() - running.started - self._mean_slot_s)
        slot = running.slot
        slot.busy = False
        if spoiled:
            self._sequences.cut(slot, 0)
        self.prefixes.on_release(slot, running.task)

    def _resume(self, out: list[wire.ToServer]) -> None:
        """Gives slots to paused tasks as far as there is room. Ends those whose time is up."""
        now = self._clock()
        for late in [
            paused.running for paused in self._room.paused if now >= paused.running.request.deadline
        ]:
            self._cut_short(late, out)
        while (resumed := self._room.resume()) is not None:
            running, restored = resumed
            if not restored:
                error = TaskFailed("ModelError", "the KV cache of the answer could not be restored")
                self._fail(running.request, error, out, running)

    # -- after an eval -----------------------------------------------------------------------------

    def _on_eval(self, running: Running, row: Row, index: int, now: float, out: list[wire.ToServer]) -> None:
        task, queued = running.task, running.request
        self._sequences.append(running.slot, row.tokens)
        if queued.id not in self._requests:
            return  # another choice of it failed in this step
        self.prefixes.on_tokens(running.slot, task)
        try:
            out += task.on_eval(len(row.tokens), Outputs(self._engine, index), now)
            if not task.ended and now >= queued.deadline:
                out += task.cut_short(now)
        except TaskFailed as error:
            self._fail(queued, error, out, running)
        except Exception as error:  # one request's fault must not end the others
            print(f"request {queued.id}: {type(error).__name__}: {error}", file=sys.stderr)
            self._fail(queued, TaskFailed("InternalError", "the answer could not be computed"), out, running)
        else:
            if task.ended:
                self._release(running)
                queued.n_open -= 1
                self._finish(queued, out)

    def _cut_late(self, batch: Sequence[Running], out: list[wire.ToServer]) -> None:
        """After an interrupted eval: ends the tasks whose time is up. The others' rows come again."""
        now = self._clock()
        for running in batch:
            queued = running.request
            if now >= queued.deadline and queued.id in self._requests:
                self._cut_short(running, out)

    def _cut_short(self, running: Running, out: list[wire.ToServer]) -> None:
        """Ends a task as it is."""
        queued = running.request
        try:
            out += running.task.cut_short(self._clock())
        except TaskFailed as error:
            self._fail(queued, error, out, running)
        else:
            self._release(running)
            queued.n_open -= 1
            self._finish(queued, out)

    def _on_partial(
        self, batch: Sequence[Running], rows: Sequence[Row], partial: Partial, out: list[wire.ToServer]
    ) -> None:
        """Rows that are complete count; the others' requests fail with the cause."""
        now = self._clock()
        for index, (running, row, done) in enumerate(zip(batch, rows, partial.done, strict=True)):
            if done == len(row.tokens):
                self._on_eval(running, row, index, now, out)
            elif running.request.id in self._requests:
                self._sequences.append(running.slot, row.tokens[:done])
                self._fail(running.request, TaskFailed("ModelError", str(partial)), out)

    def _on_engine_error(
        self, batch: Sequence[Running], rows: Sequence[Row], error: EngineError, out: list[wire.ToServer]
    ) -> None:
        """Evaluates the rows again one by one, so that only the faulty one's request fails."""
        if len(batch) == 1:
            self._fail(batch[0].request, TaskFailed("ModelError", str(error), spoiled=True), out, batch[0])
            return
        for running, row in zip(batch, rows, strict=True):
            if running.request.id not in self._requests:
                continue
            try:
                if self._engine.truncate(running.slot.index, row.pos) != row.pos:
                    raise error
                self._engine.eval([row])
            except (EngineError, NoRoom, Partial, Interrupted) as again:
                failure = TaskFailed("ModelError", str(again), spoiled=True)
                self._fail(running.request, failure, out, running)
            else:
                self._on_eval(running, row, 0, self._clock(), out)

    def _make_room(self, batch: Sequence[Running], out: list[wire.ToServer]) -> None:
        """The KV cache is full: drops the least recently used idle sequence, else fails the newest request."""
        slot = self._sequences.least_recent()
        if slot is not None:
            self._sequences.evict(slot)
            return
        newest = max(batch, key=lambda running: running.started)
        message = "the KV cache is full of running requests; try again later, or shorten the prompt"
        self._fail(newest.request, TaskFailed("Overloaded", message, spoiled=True), out, newest)

    # -- ends --------------------------------------------------------------------------------------

    def _finish(self, queued: QueuedRequest, out: list[wire.ToServer]) -> None:
        """Ends the request if all its tasks have ended."""
        if queued.n_open == 0:
            self._end(queued)
            out.append(
                wire.Done(
                    id=queued.id,
                    n_prompt=queued.n_prompt,
                    n_cached=queued.n_cached,
                    queue_ms=queued.queue_ms,
                )
            )

    def _fail(
        self,
        queued: QueuedRequest,
        error: TaskFailed,
        out: list[wire.ToServer],
        culprit: Running | None = None,
    ) -> None:
        if culprit is not None:
            self._release(culprit, spoiled=error.spoiled)
        self._end(queued)
        retry_after = self.wait_estimate() if error.kind == "Overloaded" else None
        out.append(
            wire.Failed(
                id=queued.id,
                kind=error.kind,
                message=error.message,
                param=error.param,
                retry_after=retry_after,
            )
        )

    def _end(self, queued: QueuedRequest) -> None:
        """Takes a request out of the queue and the slots."""
        del self._requests[queued.id]
        self._started.discard(queued.id)
        paused = [paused.running for paused in self._room.paused]
        for running in [r for r in [*self._running, *paused] if r.request is queued]:
            self._release(running)
        if queued in self._queue:
            self._queue.remove(queued)
