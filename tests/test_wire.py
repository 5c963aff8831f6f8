"""Frames and messages of the protocol: the same messages for any cuts, and a WireError for invalid bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyoai import wire

GENERATE = wire.Generate(
    prompt=[wire.Special("bos"), wire.Text("hi \N{GRINNING FACE}"), wire.Ids([1, 2, 3]), wire.Markup("<s>")],
    sampling=wire.Sampling(logit_bias={3: -100.0}, seed=2**64 - 1),
    n=3,
    max_tokens=None,
    stop=["\n"],
)
CHAT = wire.Conversation(messages=[wire.Message(role="user", content="hi")], template="chatml")
TO_WORKER: list[wire.ToWorker] = [
    wire.Load(path="/m.gguf", name="m", engine="fake"),
    wire.Request(id=1, body=GENERATE, client="key:a", group="g", deadline=12.5),
    wire.Request(id=2, body=wire.Generate(prompt=CHAT, sampling=wire.Sampling())),
    wire.Request(id=3, body=wire.Embed(prompt=[wire.Text("hi")], dimensions=8, param="input[0]")),
    wire.Request(id=6, body=wire.Rank(query="q", document="d", param="documents[7]")),
    wire.Request(id=4, body=wire.Tokenize(prompt=[wire.Special("eos")], pieces=True, text=True)),
    wire.Request(id=5, body=wire.Detokenize(ids=[1, 2**31 - 1])),
    wire.Cancel(1),
    wire.Shutdown(),
]
INFO = wire.ModelInfo(
    name="m",
    architecture="llama",
    quantization="Q8_0",
    engine="fake",
    n_params=1,
    n_vocab=3,
    n_ctx=8,
    n_ctx_train=8,
    n_embd=4,
    file_size=9,
    bos_id=1,
    eos_id=2,
    eog_ids=(2,),
    special={"<s>": 1, "</s>": 2},
    chat_template="",
    add_bos=True,
    add_space_prefix=False,
)
TO_SERVER: list[wire.ToServer] = [
    wire.Ready(info=INFO, n_slots=2, n_threads=1, version="fake/2", template="plain", max_step_s=0.5),
    wire.LoadFailed(message="no"),
    wire.Started(1),
    wire.Queued(1, 9),
    wire.Accepted(id=1, n_prompt=9, n_cached=3, queue_ms=1.5),
    wire.Progress(1, 6),
    wire.Content(id=1, text="a", logprobs=[wire.TokenLogprob(b"\xf0", None, [(b"x", -0.5)])]),
    wire.Content(id=1, choice=2, text="b"),
    wire.ChoiceDone(
        id=1, choice=0, finish_reason="stop", n_cached=3, n_generated=2, prompt_ms=0.5, predicted_ms=1.5
    ),
    wire.Done(id=1, n_prompt=9, n_cached=3, queue_ms=1.5),
    wire.Vector(id=1, values=b"\0\0\x80?" * 4),
    wire.Score(id=1, value=-1.5e-3),
    wire.Tokens(id=3, ids=[2], pieces=[b"\xff"], text="</s>"),
    wire.PlainText(id=4, text="\N{GRINNING FACE}"),
    wire.Failed(id=2, kind="BadRequest", message="no", param="messages"),
    wire.Heartbeat(2.0),
]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cuts the data into pieces."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


@given(st.lists(st.integers(0, 10_000)))
def test_frames_read_the_same_for_any_cuts(places: list[int]) -> None:
    data = wire.frame(TO_WORKER) + wire.frame([]) + wire.frame(TO_WORKER[:1])
    reader = wire.WorkerReader()
    got = [message for piece in cut(data, places) for message in reader.feed(piece)]
    assert got == [*TO_WORKER, TO_WORKER[0]]


def test_frames_read_byte_by_byte() -> None:
    reader = wire.ServerReader()
    got = [m for byte in wire.frame(TO_SERVER) for m in reader.feed(bytes([byte]))]
    assert got == TO_SERVER


def test_a_length_over_the_limit_is_refused_at_once() -> None:
    with pytest.raises(wire.WireError, match="claims"):
        wire.ServerReader().feed(b"\xff\xff\xff\xff")


@given(st.binary(max_size=64))
def test_garbage_raises_only_wire_errors(body: bytes) -> None:
    reader = wire.ServerReader()
    try:
        for message in reader.feed(len(body).to_bytes(4, "big") + body):
            assert isinstance(message, wire.ToServer)
    except wire.WireError:
        pass


def test_messages_for_the_other_side_are_refused() -> None:
    with pytest.raises(wire.WireError):
        wire.ServerReader().feed(wire.frame(TO_WORKER))


def test_a_frame_over_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyoai.frames.MAX_FRAME", 8)
    with pytest.raises(wire.WireError, match="limit"):
        wire.frame(TO_WORKER)
