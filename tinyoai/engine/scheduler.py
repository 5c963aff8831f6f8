"""The scheduler: requests in, one step at a time, messages for the server out.

Owns the queue, the slots and each request's way through prefill and decode. It knows an engine only
by its protocol, and no socket, process or clock but the one it is given. One step evaluates one
prefill chunk or one token for each running slot; what that step has to say is returned together.
Every request ends in exactly one Done or Failed.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from tinyoai import native, wire
from tinyoai.engine.contract import Engine, EngineError, Row
from tinyoai.engine.queue import Line
from tinyoai.engine.slots import Slot, choose
from tinyoai.text.emitter import Emitter
from tinyoai.text.segments import encode, min_tokens

if TYPE_CHECKING:
    from tinyoai.engine.pooling import Pooling

NOT_FINITE = (
    "the model computed numbers that are not finite: its file is damaged, or of a kind that this engine only "
    "seems to know"
)
MAX_STREAK = 64
"""Decode-only steps between two prefill chunks at most, whatever the clock says."""
FIRST_GUESS_S = 1.0
"""How long a request holds a slot, as long as none has ended."""
STATES_CHUNK = 8
"""Prompt tokens evaluated at once where each one's state is wanted: they are evaluated one by one."""
MAX_RETRY_S = 120.0
"""The longest wait that is advised: the SDKs heed no longer one."""


class Job:
    """One request on its way: what was asked, and how far it is."""

    __slots__ = (
        "accepted",
        "client",
        "deadline",
        "echo_logprobs",
        "emitter",
        "first_token_at",
        "give_up_at",
        "group",
        "held",
        "ids",
        "limit",
        "n_cached",
        "n_done",
        "n_emitted",
        "n_generated",
        "next_id",
        "pooling",
        "prompt_ms",
        "prompt_text",
        "queued_at",
        "request",
        "sampler",
        "slot",
        "started",
    )

    def __init__(self, request: wire.Generate, ids: list[int], prompt_text: str) -> None:
        # as asked
        self.request = request
        self.ids = ids
        self.prompt_text = prompt_text
        # while it waits for one
        self.client = request.client
        self.group = request.group or f"call {request.id}"
        self.queued_at = 0.0
        self.give_up_at = math.inf
        self.deadline = math.inf
        # once it has a slot
        self.slot: Slot | None = None
        self.sampler: native.Sampler | None = None
        self.emitter: Emitter | None = None
        self.pooling: Pooling | None = None
        """An embedding in the making: this job is its prefill and nothing else."""
        self.n_cached = 0
        self.n_done = 0
        """Prompt tokens in the KV cache, reused ones included."""
        self.n_generated = 0
        self.next_id = -1
        """The last sampled token, not yet evaluated."""
        self.limit = 0
        """Tokens to generate at most: as asked, and as the context allows."""
        self.started = 0.0
        self.first_token_at = 0.0
        self.prompt_ms = 0.0
        # log-probabilities of tokens whose text is still held back, each with its end in bytes fed
        self.held: deque[tuple[wire.TokenLogprob, int]] = deque()
        self.echo_logprobs: list[wire.TokenLogprob] = []

    @property
    def every_position(self) -> bool:
        """Something is wanted of each prompt token's evaluation, so none may come out of a cache."""
        if self.pooling is not None:
            return self.pooling.wants_all
        return self.request.echo and self.request.logprobs >= 0


def prepare(request: wire.Generate | wire.Embed, engine: Engine) -> Job | wire.Failed:
    """Tokenizes a request and checks what can be known before it waits for a slot.

    Safe to call beside a running step: engines tokenize without touching a KV cache.
    """
    if isinstance(request, wire.Embed):
        return _prepare_embed(request, engine)
    return _prepare(request, engine, n_answer=1)


def _prepare_embed(request: wire.Embed, engine: Engine) -> Job | wire.Failed:
    """An embedding as a job: an answer of no tokens, with something to do about the prompt's states."""
    from tinyoai.engine.pooling import Pooling  # numpy, which most workers never need

    info = engine.info
    if not info.n_embd_out:
        message = (
            f"{info.name} cannot embed: the engine keeps no hidden states of the architecture "
            f"{info.architecture}; models of the architectures llama and falcon can embed"
        )
        return wire.Failed(id=request.id, kind="BadRequest", message=message, param="model")
    if request.dimensions > info.n_embd_out:
        message = (
            f"dimensions: an embedding of {info.name} has {info.n_embd_out} numbers; ask for at most so many"
        )
        return wire.Failed(id=request.id, kind="BadRequest", message=message, param="dimensions")
    generate = wire.Generate(
        id=request.id,
        prompt=request.prompt,
        sampling=wire.Sampling(),
        max_tokens=0,
        exact=True,
        param=request.param,
        client=request.client,
        group=request.group,
        wait_s=request.wait_s,
    )
    job = _prepare(generate, engine, n_answer=0)
    if isinstance(job, Job):
        job.pooling = Pooling(info.pooling, info.n_embd_out, request.dimensions)
    return job


def _prepare(request: wire.Generate, engine: Engine, n_answer: int) -> Job | wire.Failed:
    info = engine.info

    def refuse(message: str, kind: str = "BadRequest", param: str | None = request.param) -> wire.Failed:
        return wire.Failed(id=request.id, kind=kind, message=message, param=param)

    def too_long(n_prompt: int, at_least: str = "") -> wire.Failed:
        return refuse(
            f"the prompt has {at_least}{n_prompt} tokens, but the context window of this model is "
            f"{info.n_ctx} tokens{', the answer included' if n_answer else ''}; shorten the {request.param}",
            "ContextLengthExceeded",
        )

    size = sum(len(s.text.encode("utf-8", "replace")) for s in request.prompt if isinstance(s, wire.Text))
    floor = min_tokens(size, engine.longest_piece)
    if floor + n_answer > info.n_ctx:
        return too_long(floor, "at least ")
    try:
        ids = encode(request.prompt, engine)
    except ValueError as error:
        return refuse(str(error))
    if not ids:
        return refuse("the prompt is empty and this model has no token to begin with; send some text")
    if len(ids) + n_answer > info.n_ctx:
        return too_long(len(ids))
    for token in request.sampling.logit_bias:
        if not 0 <= token < info.n_vocab:
            return refuse(
                f"token {token} is not in this model's vocabulary (0 to {info.n_vocab - 1})",
                param="logit_bias",
            )
    return Job(request, ids, _prompt_text(request, ids, engine) if request.echo else "")


def _prompt_text(request: wire.Generate, ids: Sequence[int], engine: Engine) -> str:
    texts = [s.text for s in request.prompt if isinstance(s, wire.Text)]
    if texts and all(isinstance(s, wire.Text | wire.Special) for s in request.prompt):
        return "".join(texts)
    whole = b"".join(engine.piece(token) for token in ids)
    if engine.info.first_piece_space and whole.startswith(b" "):
        whole = whole[1:]
    return whole.decode("utf-8", "replace")


class Scheduler:
    """Continuous batching over an engine's slots. Not thread-safe: one loop owns it."""

    def __init__(
        self,
        engine: Engine,
        *,
        n_threads: int,
        n_queue: int,
        clock: Callable[[], float],
        wait_s: float = math.inf,
    ) -> None:
        # what it works with
        self._engine = engine
        self._n_threads = n_threads
        self._wait_s = wait_s
        self._clock = clock
        # what it works on
        self._slots = [Slot(i, engine.block) for i in range(engine.n_slots)]
        self._line: Line[Job] = Line(n_queue)
        self._running: list[Job] = []
        self._held_s = FIRST_GUESS_S
        """How long requests hold a slot: a mean in which newer ones count more."""
        # fairness between prefill and decode, in seconds of step time
        self._owed = 0.0
        self._streak = 0
        self._assigned = 0
        self._turn = 0

    @property
    def idle(self) -> bool:
        """Nothing to do."""
        return not (self._running or len(self._line))

    def submit(self, job: Job) -> list[wire.ToServer]:
        """Queues a prepared request, or says that the queue is full and when there may be room."""
        now, request = self._clock(), job.request
        n_free = sum(not slot.busy for slot in self._slots)
        if not self._line.push(job, n_free):
            seconds = self.wait_estimate()
            return [
                wire.Failed(
                    id=request.id,
                    kind="Overloaded",
                    message=f"the line for this model is full ({self._line.n_requests} waiting); try again in "
                    f"about {seconds:.0f} second{'' if seconds < 1.5 else 's'}",
                    retry_after=seconds,
                )
            ]
        job.queued_at = now
        job.give_up_at = now + (self._wait_s if request.wait_s is None else request.wait_s)
        job.deadline = now + (math.inf if request.deadline_s is None else request.deadline_s)
        return []

    def wait_estimate(self) -> float:
        """Seconds until a request that comes now would get a slot: from what the last ones took."""
        n_ahead = self._line.n_requests + 1
        return min(MAX_RETRY_S, max(1.0, n_ahead * self._held_s / len(self._slots)))

    def cancel(self, request_id: int) -> list[wire.ToServer]:
        """Ends a request at once; its slot is free and keeps its prefix. Unknown ids are no error."""
        for job in chain(self._running, self._line):
            if job.request.id == request_id:
                if job.slot is None:
                    self._line.remove(job)
                self._release(job)
                return [wire.Failed(id=request_id, kind="Cancelled", message="the client left")]
        return []

    def step(self) -> list[wire.ToServer]:
        """One evaluation for every slot whose turn it is, and what came of it."""
        out: list[wire.ToServer] = []
        self._admit(out)
        turn = self._whose_turn()
        if not turn:
            return out
        started = self._clock()
        prefilling = any(job.n_done < len(job.ids) for job in turn)
        rows = [self._row(job) for job in turn]
        try:
            self._engine.eval(rows, max(1, self._n_threads // len(rows)))
        except EngineError as error:
            # which row was at fault is not known: all of this step's requests end, and their caches go
            for job in turn:
                if job.slot is not None:
                    job.slot.cut(0)
                self._fail(job, "ModelError", str(error), out)
            return out
        for job, row in zip(turn, rows, strict=True):
            if job.slot is not None and row.seen is None:
                job.slot.append(row.tokens)
            elif job.slot is not None:
                for token in row.tokens:
                    job.slot.append([token])
            self._advance(job, len(row.tokens), out)
        self._account(prefilling, self._clock() - started)
        return out

    # -- who is served ---------------------------------------------------------------------------

    def _admit(self, out: list[wire.ToServer]) -> None:
        for late in self._line.expired(self._clock()):
            waited = self._clock() - late.queued_at
            message = f"the request waited {waited:.1f} seconds for its turn, which is as long as it may"
            out.append(
                wire.Failed(
                    id=late.request.id,
                    kind="RequestTimeout",
                    message=message,
                    code="queue_timeout",
                    retry_after=self.wait_estimate(),
                )
            )
        while (job := self._line.first()) is not None:
            wanted = job.ids[:1] if job.every_position else job.ids
            found = choose(self._slots, wanted, exact=job.request.exact)
            if found is None:
                return
            self._line.pop()
            self._start(job, *found, out)

    def _start(self, job: Job, slot: Slot, n_keep: int, out: list[wire.ToServer]) -> None:
        request, info = job.request, self._engine.info
        if job.pooling is None:
            try:
                params = native.SamplerParams(
                    **msgspec.structs.asdict(request.sampling),
                    suppress=info.eog_ids,
                    top_logprobs=min(request.logprobs, info.n_vocab),
                )
                job.sampler = native.Sampler(info.n_vocab, params, info.n_ctx)
                job.sampler.accept_prompt(job.ids)
                job.emitter = Emitter(request.stop, info.first_piece_space and request.strip_space)
            except ValueError as error:
                out.append(wire.Failed(id=request.id, kind="BadRequest", message=str(error)))
                return
        slot.cut(n_keep)
        self._assigned += 1
        slot.busy, slot.last_used = True, self._assigned
        room = info.n_ctx - len(job.ids)
        job.slot = slot
        job.n_cached = job.n_done = n_keep
        job.limit = room if request.max_tokens is None else min(room, request.max_tokens)
        job.started = self._clock()
        self._running.append(job)
        queue_ms = (job.started - job.queued_at) * 1000.0
        out.append(wire.Accepted(id=request.id, n_prompt=len(job.ids), n_cached=n_keep, queue_ms=queue_ms))
        if request.echo and request.logprobs < 0:
            out.append(wire.Delta(id=request.id, text=job.prompt_text))

    def _whose_turn(self) -> list[Job]:
        """All that decode; and of those that prefill one if any decode, else all.

        Decodes are owed as much time as prefill chunks took from them, so a long prompt at most
        halves their speed, and they at most halve its.
        """
        decoding = [job for job in self._running if job.n_done == len(job.ids)]
        prefilling = [job for job in self._running if job.n_done < len(job.ids)]
        if not decoding or not prefilling:
            self._owed = 0.0
            return decoding or prefilling
        if self._owed > 0.0 and self._streak < MAX_STREAK:
            return decoding
        self._turn += 1
        return [*decoding, prefilling[self._turn % len(prefilling)]]

    def _account(self, prefilling: bool, took: float) -> None:
        if prefilling:
            self._owed, self._streak = took, 0
        else:
            self._owed -= took
            self._streak += 1

    def _row(self, job: Job) -> Row:
        assert job.slot is not None
        if job.n_done == len(job.ids):
            return Row(job.slot.index, [job.next_id], len(job.slot.tokens))
        if job.pooling is not None and job.every_position:
            end = min(len(job.ids), job.n_done + STATES_CHUNK)
            return Row(job.slot.index, job.ids[job.n_done : end], job.n_done, job.pooling.add)
        if job.every_position:
            end = job.n_done + 1
        else:
            # chunks end on a fixed grid of positions, so that the same prompt is always cut alike
            n_batch = self._engine.n_batch
            end = min(len(job.ids), (job.n_done // n_batch + 1) * n_batch)
        return Row(job.slot.index, job.ids[job.n_done : end], job.n_done)

    # -- what a step brought ---------------------------------------------------------------------

    def _advance(self, job: Job, n_tokens: int, out: list[wire.ToServer]) -> None:
        if job.pooling is not None:
            self._embed(job, job.pooling, n_tokens, out)
            return
        try:
            if job.n_generated == 0 and not self._prefilled(job, n_tokens, out):
                if self._clock() >= job.deadline:
                    self._finish(job, "length", out)
                return
            if job.limit == 0 or self._clock() >= job.deadline:
                self._finish(job, "length", out)
                return
            self._sample(job, out)
        except native.NonFiniteLogits:
            if job.slot is not None:
                job.slot.cut(0)
            self._fail(job, "ModelError", NOT_FINITE, out)
        except native.NoCandidates:
            message = "logit_bias forbids every token of the vocabulary"
            self._fail(job, "BadRequest", message, out)

    def _prefilled(self, job: Job, n_tokens: int, out: list[wire.ToServer]) -> bool:
        """Counts a prefill chunk; true once the whole prompt is evaluated."""
        assert job.slot is not None and job.sampler is not None
        job.n_done += n_tokens
        request = job.request
        score_prompt = job.every_position
        if job.n_done < len(job.ids):
            if score_prompt:
                self._score(job, job.ids[job.n_done])
            return False
        job.first_token_at = self._clock()
        job.prompt_ms = (job.first_token_at - job.started) * 1000.0
        if score_prompt:
            out.append(wire.Delta(id=request.id, text=job.prompt_text, logprobs=self._with_first_token(job)))
        return True

    def _embed(self, job: Job, pooling: "Pooling", n_tokens: int, out: list[wire.ToServer]) -> None:
        assert job.slot is not None
        job.n_done += n_tokens
        if job.n_done < len(job.ids):
            return
        if not pooling.wants_all:
            pooling.add(self._engine.state(job.slot.index))
        try:
            values = pooling.unit()
        except ArithmeticError:
            job.slot.cut(0)
            self._fail(job, "ModelError", NOT_FINITE, out)
            return
        out.append(wire.Vector(id=job.request.id, values=values))
        job.first_token_at = self._clock()
        job.prompt_ms = (job.first_token_at - job.started) * 1000.0
        job.slot.last_used = (
            0  # nobody goes on from here: the next one takes this slot before any conversation's
        )
        self._end(job, "stop", out)

    def _score(self, job: Job, token: int) -> None:
        assert job.slot is not None and job.sampler is not None
        logprob, top = job.sampler.score(self._engine.logits(job.slot.index), token)
        job.echo_logprobs.append(self._token_logprob(token, logprob, top))

    def _with_first_token(self, job: Job) -> list[wire.TokenLogprob]:
        """The prompt's tokens as the client counts them: without a BOS that it did not send."""
        engine = self._engine
        added_bos = isinstance(job.request.prompt[0], wire.Special) and job.ids[0] == engine.info.bos_id
        entries = job.echo_logprobs
        first = job.ids[0]
        if added_bos and len(job.ids) > 1:
            entries, first = entries[1:], job.ids[1]
        piece = engine.piece(first)
        if engine.info.first_piece_space and piece.startswith(b" "):
            piece = piece[1:]
        return [wire.TokenLogprob(piece, None), *entries]

    def _sample(self, job: Job, out: list[wire.ToServer]) -> None:
        request, sampler, emitter, slot = job.request, job.sampler, job.emitter, job.slot
        assert sampler is not None and emitter is not None and slot is not None
        suppress = request.ignore_eos or job.n_generated < request.min_tokens
        token = sampler.sample(self._engine.logits(slot.index), suppress)
        job.n_generated += 1
        if token in self._engine.info.eog_ids:
            if request.score_end and request.logprobs >= 0:
                entry = self._token_logprob(token, sampler.logprob, sampler.top)
                job.held.append((entry, emitter.n_fed))
            self._finish(job, "stop", out)
            return
        job.next_id = token
        piece = self._engine.piece(token)
        text = emitter.feed(piece)
        if request.logprobs >= 0:
            entry = self._token_logprob(token, sampler.logprob, sampler.top)
            job.held.append((entry, emitter.n_fed))
        if emitter.stopped:
            self._finish(job, "stop", out, text)
        elif job.n_generated >= job.limit:
            self._finish(job, "length", out, text)
        elif text:
            out.append(wire.Delta(id=request.id, text=text, logprobs=self._certain(job)))

    def _token_logprob(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]]
    ) -> wire.TokenLogprob:
        piece = self._engine.piece
        return wire.TokenLogprob(piece(token), logprob, [(piece(t), p) for t, p in top])

    def _certain(self, job: Job) -> list[wire.TokenLogprob]:
        """The log-probabilities of tokens whose bytes have left the emitter."""
        if not job.held:
            return []
        assert job.emitter is not None
        n_out = job.emitter.n_out
        ready = []
        while job.held and job.held[0][1] <= n_out:
            ready.append(job.held.popleft()[0])
        return ready

    def _finish(self, job: Job, reason: wire.FinishReason, out: list[wire.ToServer], text: str = "") -> None:
        request, emitter = job.request, job.emitter
        assert emitter is not None
        text += emitter.flush()
        logprobs = self._certain(job)
        if not emitter.stopped:
            logprobs += [entry for entry, _ in job.held]
        if text or logprobs:
            out.append(wire.Delta(id=request.id, text=text, logprobs=logprobs))
        self._end(job, reason, out)

    def _end(self, job: Job, reason: wire.FinishReason, out: list[wire.ToServer]) -> None:
        ended = self._clock()
        if not job.first_token_at:  # its time was up in the middle of the prompt
            job.first_token_at = ended
            job.prompt_ms = (ended - job.started) * 1000.0
        out.append(
            wire.Done(
                id=job.request.id,
                finish_reason=reason,
                n_prompt=len(job.ids),
                n_cached=job.n_cached,
                n_generated=job.n_generated,
                prompt_ms=job.prompt_ms,
                predicted_ms=(ended - job.first_token_at) * 1000.0,
                queue_ms=(job.started - job.queued_at) * 1000.0,
            )
        )
        self._release(job)

    def _fail(self, job: Job, kind: str, message: str, out: list[wire.ToServer]) -> None:
        out.append(wire.Failed(id=job.request.id, kind=kind, message=message))
        self._release(job)

    def _release(self, job: Job) -> None:
        if job in self._running:
            self._running.remove(job)
            self._held_s += 0.2 * (self._clock() - job.started - self._held_s)
        if job.slot is not None:
            job.slot.busy = False
            job.slot = None
