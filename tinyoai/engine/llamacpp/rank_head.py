"""Files that rank: their head, which turns the hidden state of a query and a document into scores.

llama.cpp reads as many scores as the header has labels, whatever the head gives; so both are compared here.
"""

from typing import NamedTuple

from tinyoai import gguf

RANK = 4
"""The `pooling_type` of a file that ranks."""
TEMPLATE = "tokenizer.chat_template.rerank"
"""The key of a file's own prompt, in which QUERY and DOCUMENT stand for the texts."""
QUERY, DOCUMENT = "{query}", "{document}"
_MEAN = 1


class _Head(NamedTuple):
    tensor: str
    """Its last matrix, with a row for each label."""
    fewest: int = 1
    most: int = 1 << 16
    """Labels."""


_HEADS = {
    "bert": _Head("cls.output.weight"),
    "modern-bert": _Head("cls.output.weight"),
    "neo-bert": _Head("cls.output.weight"),
    # its only matrix is the last one
    "jina-bert-v2": _Head("cls.weight", most=1),
    # a softmax over its labels follows, and that of one label is always 1
    "qwen3": _Head("cls.output.weight", fewest=2),
    "qwen3vl": _Head("cls.output.weight", fewest=2),
}
"""The families whose heads llama.cpp reads."""
_DECODERS = ("qwen3", "qwen3vl")


def ranks(header: gguf.Header) -> bool:
    """Whether the file is made to score pairs of texts."""
    return bool(header.value("pooling_type") == RANK)


def template(header: gguf.Header) -> str:
    """The prompt of a pair; empty: the file has none."""
    found = header.metadata.get(TEMPLATE, "")
    return found if isinstance(found, str) else ""


def fault(header: gguf.Header) -> str | None:
    """Why the head of a file that ranks cannot be used, in words that follow the file's name; None if it can."""
    head = _HEADS.get(header.architecture)
    if head is None:
        return (
            f"is made to rank, but llama.cpp reads no rank head of a {header.architecture[:40]} model; "
            f"choose a reranker of another family: {', '.join(_HEADS)}"
        )
    labels = header.value("classifier.output_labels")
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(label, bytes) for label in labels)
    ):
        return "has no usable classifier.output_labels in its header; convert the model again"
    n = len(labels or ()) or 1
    if not head.fewest <= n <= head.most:
        return f"has a rank head with {n} labels, from which llama.cpp computes no score; convert the model again"
    tensor = header.tensors.get(head.tensor)
    wanted = [int(header.value("embedding_length")), n, 1, 1]
    if tensor is None or [*tensor.shape, 1, 1, 1, 1][:4] != wanted:
        return f"is made to rank, but has no {head.tensor} with {n} rows; choose a complete reranker"
    if header.architecture in _DECODERS and header.value("classifier.pooling_type") == _MEAN:
        return "scores a mean of hidden states, which llama.cpp computes of a part of a text; choose another reranker"
    prompt = header.metadata.get(TEMPLATE)
    if prompt is not None and not (isinstance(prompt, str) and QUERY in prompt and DOCUMENT in prompt):
        return f"has a {TEMPLATE} without {QUERY} and {DOCUMENT}; convert the model again"
    return None
