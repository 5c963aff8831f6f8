"""The prompt of a query and a document, for models that rank."""

import re
from collections.abc import Iterable
from functools import lru_cache

from tinyoai import wire
from tinyoai.engine.contract import PairForm
from tinyoai.text.marker_guard import MarkerGuard

_PLACE = re.compile(r"\{(query|document)\}")


def segments(query: str, document: str, form: PairForm, special: Iterable[str]) -> list[wire.Segment]:
    """The prompt in the form that the model was trained for. The two texts never become control tokens."""
    if not form.template:
        before, between, after = (wire.Ids(list(ids)) for ids in (form.before, form.between, form.after))
        return [before, wire.Text(query), between, wire.Text(document), after]
    texts = {"query": query, "document": document}
    found: list[wire.Segment] = []
    # control tokens are found in the template alone, before the texts are in it
    for part in _parts(form.template, tuple(special)):
        if isinstance(part, wire.Text):
            # one pass: a query with "{document}" in it stays as it is
            part = wire.Text(_PLACE.sub(lambda place: texts[place[1]], part.text))
        found.append(part)
    return found


@lru_cache(maxsize=1)
def _parts(template: str, special: tuple[str, ...]) -> list[wire.Segment]:
    return MarkerGuard(special).split(template)
