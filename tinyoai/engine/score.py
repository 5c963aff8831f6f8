"""ScoreTask: how well a document answers a query, a prefill of both that ends in a Score."""

import math

from tinyoai import wire
from tinyoai.engine import text_rows
from tinyoai.engine.contract import Engine, Row, Want
from tinyoai.engine.generate import NOT_FINITE
from tinyoai.engine.tasks import Outputs, TaskFailed


class ScoreTask(text_rows.TextTask):
    """Scores one pair. Pairs with the same query share the beginning of their prompts, where a model can reuse it."""

    def __init__(self, request_id: int, ids: list[int], engine: Engine) -> None:
        super().__init__(request_id, ids, engine, in_parts=not engine.caps.whole_rows)

    def next_row(self, budget: int) -> Row | None:
        """See Task."""
        if self._caps.whole_rows:
            return text_rows.whole(self._seq, self.ids, budget, self._caps, Want.SCORE, self.adapters)
        return text_rows.in_parts(
            self._seq, self.ids, self._n_past, budget, self._caps, Want.SCORE, self.adapters
        )

    def on_eval(self, n_tokens: int, outputs: Outputs, now: float) -> list[wire.ToServer]:
        """See Task."""
        self._n_past += n_tokens
        if self._n_past < len(self.ids):
            return []
        value = outputs.score()
        if not math.isfinite(value):
            raise TaskFailed("ModelError", NOT_FINITE, spoiled=True)
        self.prefilling, self.ended = False, True
        return [wire.Score(id=self._id, value=value)]

    def cut_short(self, now: float) -> list[wire.ToServer]:
        """See Task. Part of a pair has no score."""
        raise TaskFailed("RequestTimeout", "the time limit passed while the document was being scored")
