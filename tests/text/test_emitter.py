"""Bytes to text: the same text for any cuts, no split code point, no stop sequence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai.text.emitter import Emitter
from tinyoai.text.segments import encode, min_tokens
from tinyoai.wire import Ids, Segment, Special, Text

PIECES = st.lists(
    st.sampled_from(
        [b"a", b"b", b"ab", b" ", b"st", b"op", b"\xf0\x9f", b"\x98\x80", b"\xc3", b"\xa9", b"\xff"]
    )
)
STOPS = st.lists(st.sampled_from(["stop", "ab", "\u00e9", "ba a", "a"]), max_size=3)


def run(pieces: list[bytes], stop: list[str], strip: bool) -> tuple[str, bool]:
    """Returns the text of an answer and whether a stop sequence ended it."""
    emitter = Emitter(stop, strip)
    text = "".join(emitter.feed(piece) for piece in pieces)
    return text + emitter.flush(), emitter.stopped


def reference(data: bytes, stop: list[str], strip: bool) -> tuple[str, bool]:
    """Computes the same from the whole text."""
    if strip and data.startswith(b" "):
        data = data[1:]
    for end in range(len(data) + 1):
        found = [data[:end].rindex(s.encode()) for s in stop if data[:end].endswith(s.encode())]
        if found:
            return data[: min(found)].decode("utf-8", "replace"), True
    return data.decode("utf-8", "replace"), False


@given(PIECES, STOPS, st.booleans())
def test_the_text_is_the_same_for_any_cuts(pieces: list[bytes], stop: list[str], strip: bool) -> None:
    data = b"".join(pieces)
    expected = reference(data, stop, strip)
    assert run(pieces, stop, strip) == expected
    assert run([data], stop, strip) == expected
    assert run([bytes([byte]) for byte in data], stop, strip) == expected


@given(PIECES, STOPS)
def test_counts_of_bytes_in_and_out(pieces: list[bytes], stop: list[str]) -> None:
    emitter = Emitter(stop, False)
    text = ""
    for piece in pieces:
        text += emitter.feed(piece)
        assert emitter.n_out <= emitter.n_fed
    emitter.flush()
    if not emitter.stopped:
        assert emitter.n_out == emitter.n_fed


def test_only_what_could_become_a_stop_is_held() -> None:
    emitter = Emitter(["stop"], False)
    assert [emitter.feed(piece) for piece in (b"a s", b"t", b"ra s", b"to", b"p more")] == [
        "a ",
        "",
        "stra ",
        "",
        "",
    ]
    assert emitter.stopped
    assert emitter.feed(b"more") == ""
    assert emitter.flush() == ""


class Vocabulary:
    """A vocabulary whose tokens are code points."""

    n_vocab, bos_id, eos_id = 300, 1, 2
    add_bos = True
    special = {"<|im_start|>": 5}  # noqa: RUF012 - a constant of the test

    @property
    def info(self) -> "Vocabulary":
        """Returns itself."""
        return self

    def tokenize(self, text: str) -> list[int]:
        """Returns the code points."""
        return [ord(c) for c in text]


def test_control_tokens_come_only_from_structure() -> None:
    segments: list[Segment] = [
        Special("bos"),
        Special("<|im_start|>"),
        Text("<s>"),
        Ids([7, 8]),
        Text(""),
        Special("eos"),
    ]
    assert encode(segments, Vocabulary()) == [1, 5, 60, 115, 62, 7, 8, 2]


def test_a_prompt_has_no_bos_where_the_model_wants_none() -> None:
    vocabulary = Vocabulary()
    vocabulary.add_bos = False
    assert encode([Special("bos"), Text("a")], vocabulary) == [97]


@pytest.mark.parametrize("segment", [Ids([300]), Ids([-1]), Special("<|nothing|>")])
def test_segments_without_an_id_are_refused(segment: Segment) -> None:
    with pytest.raises(ValueError, match=r"vocabulary|control token"):
        encode([segment], Vocabulary())


def test_min_tokens() -> None:
    assert (min_tokens(100, 8), min_tokens(7, 8), min_tokens(5, 0)) == (12, 0, 5)
