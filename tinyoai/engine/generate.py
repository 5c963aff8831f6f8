"""GenerateTask: one choice of a Generate, from prefill to its last token."""

from collections import deque
from collections.abc import Sequence

from tinyoai import native, wire
from tinyoai.engine.contract import Adapter, Capabilities, Engine, Row, Want
from tinyoai.engine.tasks import Outputs, TaskFailed
from tinyoai.sampling import for_choice
from tinyoai.text.emitter import Emitter

NOT_FINITE = "the model computed numbers that are not finite; its file is damaged, or the engine misreads it"
EXPECTED_TOKENS = 256
"""Tokens of an answer that KV cells are kept for. A longer one takes what is free, and may be paused."""
PROGRESS_S = 1.0
"""Seconds between two Progress events of a prefill."""


class GenerateTask:
    """One choice. `stop` are all stop strings; `prompt_text` is the prompt for `echo`."""

    keeps_prefix = True

    def __init__(
        self,
        request_id: int,
        choice: int,
        body: wire.Generate,
        ids: list[int],
        engine: Engine,
        *,
        stop: Sequence[str],
        prompt_text: str = "",
        copies_from_first: bool = False,
        adapters: tuple[Adapter, ...] = (),
        n_resumable: int = 0,
        checkpoint: int = 0,
    ) -> None:
        # as asked
        self.adapters = adapters
        self.ids = ids
        self.n_expected = min(
            engine.info.n_ctx,
            len(ids)
            + (EXPECTED_TOKENS if body.max_tokens is None else min(EXPECTED_TOKENS, body.max_tokens)),
        )
        self.exact = body.exact
        self.copies_from_first = copies_from_first
        """Its prompt will be copied from the first choice's sequence."""
        self.n_resumable = n_resumable
        self.checkpoint = checkpoint
        self.cache_miss = -1
        self.prefilling = True
        self.ended = False
        self._id = request_id
        self._choice = choice
        self._body = body
        self._stop = stop
        self._prompt_text = prompt_text
        self._engine = engine
        self._caps: Capabilities = engine.caps
        self._eog_ids = engine.info.eog_ids
        self._scores_prompt = body.echo and body.logprobs >= 0
        self.n_reusable = 0 if self._scores_prompt else len(ids)
        # once it has a sequence
        self._seq = -1
        self._sampler: native.Sampler
        self._emitter: Emitter
        self._n_cached = 0
        self._n_past = 0
        """Tokens in its sequence."""
        self._n_generated = 0
        self._last_token = -1
        """The last sampled token, not evaluated yet."""
        self._max_new_tokens = 0
        self._started = self._first_token_at = self._progress_at = 0.0
        self._pending_logprobs: deque[tuple[wire.TokenLogprob, int]] = deque()
        """Of tokens whose text is still held back, each with its end in bytes fed."""
        self._prompt_logprobs: list[wire.TokenLogprob] = []

    # -- the Task protocol -----------------------------------------------------------------------

    def start(self, seq: int, n_cached: int, now: float) -> list[wire.ToServer]:
        """See Task."""
        body, info = self._body, self._engine.info
        try:
            self._sampler = native.Sampler(
                info.n_vocab,
                for_choice(body.sampling, self._choice),
                info.n_ctx,
                suppress=info.eog_ids,
                top_logprobs=min(body.logprobs, info.n_vocab),
            )
            self._sampler.accept_prompt(self.ids)
            chat = isinstance(body.prompt, wire.Conversation)
            self._emitter = Emitter(self._stop, info.add_space_prefix and chat)
        except ValueError as error:
            raise TaskFailed("BadRequest", str(error)) from None
        self._seq = seq
        self._n_cached = self._n_past = n_cached
        self._started = self._progress_at = now
        room = info.n_ctx - len(self.ids)
        self._max_new_tokens = room if body.max_tokens is None else min(room, body.max_tokens)
        if body.echo and body.logprobs < 0:
            return [wire.Content(id=self._id, choice=self._choice, text=self._prompt_text)]
        return []

    def move(self, seq: int) -> None:
        """See Task."""
        self._seq = seq

    def next_row(self, budget: int) -> Row | None:
        """See Task."""
        if not self.prefilling:
            return Row(self._seq, [self._last_token], self._n_past, Want.LAST, self.adapters)
        caps, begin, n = self._caps, self._n_past, len(self.ids)
        if caps.whole_rows:
            row = Row(self._seq, self.ids, 0, Want.LAST, self.adapters)
            return row if n <= max(budget, caps.n_row) else None
        if self._scores_prompt:
            end = min(n, begin + min(budget, caps.n_outputs))
            return Row(self._seq, self.ids[begin:end], begin, Want.ALL, self.adapters)
        last = self.checkpoint if begin < self.checkpoint else n
        end = min(last, begin + budget, begin + caps.n_row)
        if end < last and end - end % caps.align > begin:
            end -= end % caps.align
        want = Want.LAST if end == n else Want.NOTHING
        return Row(self._seq, self.ids[begin:end], begin, want, self.adapters)

    def on_eval(self, n_tokens: int, outputs: Outputs, now: float) -> list[wire.ToServer]:
        """See Task."""
        self._n_past += n_tokens
        try:
            if not self.prefilling:
                return self._sample(outputs, now)
            events = self._on_prefill(n_tokens, outputs, now)
            if self.prefilling:
                return events
            if self._max_new_tokens == 0:
                return [*events, *self._finish("length", now)]
            return events + self._sample(outputs, now)
        except native.NonFiniteLogits:
            raise TaskFailed("ModelError", NOT_FINITE, spoiled=True) from None
        except native.NoCandidates:
            raise TaskFailed("BadRequest", "logit_bias bans every token of the vocabulary") from None

    def cut_short(self, now: float) -> list[wire.ToServer]:
        """See Task."""
        return self._finish("length", now)

    # -- prefill ---------------------------------------------------------------------------------

    def _on_prefill(self, n_tokens: int, outputs: Outputs, now: float) -> list[wire.ToServer]:
        begin, n = self._n_past - n_tokens, len(self.ids)
        if self._scores_prompt:
            for i in range(n_tokens):
                if begin + i + 1 < n:
                    self._score(outputs.logits(i), self.ids[begin + i + 1])
        if self._n_past < n:
            if now - self._progress_at < PROGRESS_S:
                return []
            self._progress_at = now
            return [wire.Progress(self._id, self._n_past)]
        self.prefilling = False
        self._first_token_at = now
        if self._scores_prompt:
            logprobs = self._with_first_token()
            return [wire.Content(id=self._id, choice=self._choice, text=self._prompt_text, logprobs=logprobs)]
        return []

    def _score(self, logits: object, token: int) -> None:
        logprob, top = self._sampler.score(logits, token)
        self._prompt_logprobs.append(self._token_logprob(token, logprob, top))

    def _with_first_token(self) -> list[wire.TokenLogprob]:
        """The prompt's log-probabilities as the client counts tokens: without a BOS that it did not send."""
        engine, prompt = self._engine, self._body.prompt
        first, entries = self.ids[0], self._prompt_logprobs
        with_bos = not isinstance(prompt, wire.Conversation) and isinstance(prompt[0], wire.Special)
        if with_bos and first == engine.info.bos_id and len(self.ids) > 1:
            first, entries = self.ids[1], entries[1:]
        piece = engine.piece(first)
        if engine.info.add_space_prefix and piece.startswith(b" "):
            piece = piece[1:]
        return [wire.TokenLogprob(piece, None), *entries]

    # -- decode ----------------------------------------------------------------------------------

    def _sample(self, outputs: Outputs, now: float) -> list[wire.ToServer]:
        body, sampler, emitter = self._body, self._sampler, self._emitter
        suppress = body.ignore_eos or self._n_generated < body.min_tokens
        token = sampler.sample(outputs.engine.logits(outputs.row), suppress)
        self._n_generated += 1
        if token in self._eog_ids:
            if body.score_end and body.logprobs >= 0:
                entry = self._token_logprob(token, sampler.logprob, sampler.top)
                self._pending_logprobs.append((entry, emitter.n_fed))
            return self._finish("stop", now)
        self._last_token = token
        text = emitter.feed(self._engine.piece(token))
        if body.logprobs >= 0:
            entry = self._token_logprob(token, sampler.logprob, sampler.top)
            self._pending_logprobs.append((entry, emitter.n_fed))
        if emitter.stopped:
            return self._finish("stop", now, text)
        if self._n_generated >= self._max_new_tokens:
            return self._finish("length", now, text)
        if not text:
            return []
        return [
            wire.Content(id=self._id, choice=self._choice, text=text, logprobs=self._releasable_logprobs())
        ]

    def _token_logprob(
        self, token: int, logprob: float, top: Sequence[tuple[int, float]]
    ) -> wire.TokenLogprob:
        piece = self._engine.piece
        return wire.TokenLogprob(piece(token), logprob, [(piece(t), p) for t, p in top])

    def _releasable_logprobs(self) -> list[wire.TokenLogprob]:
        """The log-probabilities of tokens whose bytes have left the emitter."""
        pending = self._pending_logprobs
        if not pending:
            return []
        n_out, found = self._emitter.n_out, []
        while pending and pending[0][1] <= n_out:
            found.append(pending.popleft()[0])
        return found

    def _finish(self, reason: wire.FinishReason, now: float, text: str = "") -> list[wire.ToServer]:
        self.ended = True
        text += self._emitter.flush()
        logprobs = self._releasable_logprobs()
        if not self._emitter.stopped:
            logprobs += [entry for entry, _ in self._pending_logprobs]
        events: list[wire.ToServer] = []
        if text or logprobs:
            events.append(wire.Content(id=self._id, choice=self._choice, text=text, logprobs=logprobs))
        prefilled = self._first_token_at or now  # its time may be up in the middle of the prompt
        events.append(
            wire.ChoiceDone(
                id=self._id,
                choice=self._choice,
                finish_reason=reason,
                n_cached=self._n_cached,
                cache_miss=self.cache_miss,
                n_generated=self._n_generated,
                prompt_ms=(prefilled - self._started) * 1000.0,
                predicted_ms=(now - prefilled) * 1000.0,
            )
        )
        return events
