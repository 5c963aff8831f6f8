"""Data sets: valid lines, and the files that can be reached."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tinyoai.finetune import dataset
from tinyoai.finetune.dataset import DatasetError, parse, read

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def lines(*rows: Any) -> bytes:
    """Returns JSON Lines."""
    return b"\n".join(json.dumps(row).encode() for row in rows)


def test_every_form_is_read() -> None:
    found = parse(
        lines(
            CHAT,
            {"prompt": "a", "completion": "b"},
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "input": "c", "output": "b", "more": 1},
            {"text": "all of it"},
        )
    )
    turns = [[(turn.role, turn.content) for turn in example.turns] for example in found]
    assert turns[:3] == [[("user", "a"), ("assistant", "b")]] * 3
    assert turns[3][0] == ("user", "a\nc")
    assert turns[4] == []
    assert found[4].text == "all of it"


def test_an_array_and_windows_line_ends_are_read() -> None:
    assert parse(json.dumps([CHAT, CHAT]).encode()) == parse(lines(CHAT, CHAT))
    assert len(parse(lines(CHAT, CHAT).replace(b"\n", b"\r\n\r\n"))) == 2


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no examples"),
        (b" \n\n", "no examples"),
        (b"hello", "line 1"),
        (lines(CHAT) + b"\n{", "line 2"),
        (b'{"text": "\xff"}', "line 1"),
        (b"\x1f\x8b" + bytes(100), "line 1"),
        (lines({}), "line 1"),
        (lines({"text": "a", "prompt": "b", "completion": "c"}), "line 1"),
        (lines({"text": "  "}), "nothing"),
        (lines({"prompt": "a"}), "without a completion"),
        (lines({"instruction": "a"}), "without an output"),
        (lines({"messages": [{"role": "user", "content": "a"}]}), "nothing"),
        (lines({"messages": []}), "nothing"),
        (lines({"messages": [{"role": "robot", "content": "a"}]}), "role"),
        (lines({"text": 1}), "text"),
        (lines({"text": "a\0b"}), "NUL"),
        (b'{"text": "\\ud800"}', "line 1"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": ' + b"[" * 100_000, "line 1"),
        (b"[1]", "example 1"),
        (lines({"text": "x" * dataset.MAX_LINE}), "longer"),
    ],
)
def test_errors_name_the_position(data: bytes, words: str) -> None:
    with pytest.raises(DatasetError, match=words):
        parse(data)


def test_a_data_set_that_is_too_large_is_refused() -> None:
    with pytest.raises(DatasetError, match="more than"):
        parse(b'{"text":"a"}\n' * (dataset.MAX_EXAMPLES + 1))
    with pytest.raises(DatasetError, match="bytes"):
        parse(bytes(dataset.MAX_BYTES + 1))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one data set, and a secret file beside the folder."""
    folder = tmp_path / "datasets"
    (folder / "sub").mkdir(parents=True)
    (folder / "faq.jsonl").write_bytes(lines(CHAT))
    (folder / "sub" / "more.json").write_bytes(b"[]")
    (tmp_path / "secret.jsonl").write_bytes(b"secret")
    (folder / "link.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (folder / "out").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.jsonl")
    return folder


def test_a_data_set_has_a_name_or_a_path(root: Path) -> None:
    for name in ("faq", "faq.jsonl", "./faq", "sub/../faq", str(root / "faq.jsonl")):
        assert read(root, name) == lines(CHAT)
    assert read(root, "sub/more") == b"[]"
    assert "faq.jsonl" in list(dataset.names(root))


@pytest.mark.parametrize(
    "name",
    ["../secret", "../secret.jsonl", "sub/../../secret.jsonl", "/etc/passwd", "link", "out/secret.jsonl", "pipe",
     "sub", ".", "", "none", "faq/x", "a\0b", "x" * 5000, "/dev/zero"],
)  # fmt: skip
def test_nothing_else_can_be_reached(root: Path, name: str) -> None:
    with pytest.raises(DatasetError):
        read(root, name)
    with pytest.raises(DatasetError):
        read(root.parent / "not there", name)


def test_the_error_for_a_link_says_that_links_are_not_followed(root: Path) -> None:
    with pytest.raises(DatasetError, match="links are not followed"):
        read(root, "link")


def test_the_error_for_an_unknown_name_lists_data_sets_without_their_path(root: Path) -> None:
    with pytest.raises(DatasetError, match=r"faq\.jsonl") as caught:
        read(root, "fak")
    assert str(root) not in str(caught.value)


def test_a_folder_that_is_swapped_for_a_link_is_not_followed(root: Path) -> None:
    for _ in range(50):
        os.rename(root / "sub", root / "away")
        os.symlink(root.parent, root / "sub")
        with pytest.raises(DatasetError):
            read(root, "sub/secret.jsonl")
        os.unlink(root / "sub")
        os.rename(root / "away", root / "sub")
