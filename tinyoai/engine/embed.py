"""EmbedTask: the embedding of one text, a prefill that ends in a Vector."""

from tinyoai import wire
from tinyoai.engine import text_rows
from tinyoai.engine.contract import Engine, Row, Want
from tinyoai.engine.generate import NOT_FINITE
from tinyoai.engine.pooling import LAST, Pooling
from tinyoai.engine.tasks import Outputs, TaskFailed


class EmbedTask(text_rows.TextTask):
    """Pools token states itself, or takes the engine's embedding where the engine pools."""

    def __init__(self, request_id: int, body: wire.Embed, ids: list[int], engine: Engine) -> None:
        info, caps = engine.info, engine.caps
        self._last_only = info.pooling == LAST
        self._pooling = Pooling(LAST if caps.pools else info.pooling, info.n_embd_out, body.dimensions)
        super().__init__(
            request_id, ids, engine, in_parts=self._last_only and not (caps.pools or caps.whole_rows)
        )

    def next_row(self, budget: int) -> Row | None:
        """See Task."""
        caps, begin, n = self._caps, self._n_past, len(self.ids)
        if caps.pools or caps.whole_rows:
            return text_rows.whole(self._seq, self.ids, budget, caps, Want.EMBEDDING, self.adapters)
        if not self._last_only:
            end = min(n, begin + min(budget, caps.n_outputs))
            return Row(self._seq, self.ids[begin:end], begin, Want.EMBEDDING, self.adapters)
        return text_rows.in_parts(self._seq, self.ids, begin, budget, caps, Want.EMBEDDING, self.adapters)

    def on_eval(self, n_tokens: int, outputs: Outputs, now: float) -> list[wire.ToServer]:
        """See Task."""
        self._n_past += n_tokens
        if not self._last_only or self._n_past == len(self.ids):
            self._pooling.add(outputs.embedding())
        if self._n_past < len(self.ids):
            return []
        try:
            values = self._pooling.unit()
        except ArithmeticError:
            raise TaskFailed("ModelError", NOT_FINITE, spoiled=True) from None
        self.prefilling, self.ended = False, True
        return [wire.Vector(id=self._id, values=values)]

    def cut_short(self, now: float) -> list[wire.ToServer]:
        """See Task. Part of a text has no embedding."""
        raise TaskFailed("RequestTimeout", "the time limit passed while the text was being embedded")
