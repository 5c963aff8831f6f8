"""Data sets: the forms of an example, and safe reading of data set files.

A data set is a file below one folder or comes with the request. No other file can be read.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

MAX_BYTES = 64 << 20
MAX_LINE = 1 << 20
MAX_EXAMPLES = 100_000
SUFFIXES = ("", ".jsonl", ".json")
"""Tried after a name, in this order."""

_FORMS = (
    'expected {"messages": [...]}, {"prompt": ..., "completion": ...}, {"instruction": ..., "output": ...} '
    'or {"text": ...}'
)


class DatasetError(Exception):
    """The data set cannot be used. The message says why and what to do."""


class Turn(Struct, frozen=True, kw_only=True):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Meta(max_length=MAX_LINE)]


class Example(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One example, in one of four forms. The assistant's messages, the completion, output or text are learned."""

    messages: list[Turn] | None = None
    prompt: str | None = None
    completion: str | None = None
    instruction: str | None = None
    input: str | None = None
    output: str | None = None
    text: str | None = None

    @property
    def turns(self) -> list[Turn]:
        """The example as a conversation; empty for a plain text."""
        if self.messages is not None:
            return self.messages
        if self.prompt is not None:
            question, answer = self.prompt, self.completion
        elif self.instruction is not None:
            question = f"{self.instruction}\n{self.input}" if self.input else self.instruction
            answer = self.output
        else:
            return []
        return [Turn(role="user", content=question), Turn(role="assistant", content=answer or "")]


_decoder = msgspec.json.Decoder(Example)
_list = msgspec.json.Decoder(list[msgspec.Raw])


def check(example: Example) -> None:
    """Raise ValueError if an example has none of the forms, or nothing to learn."""
    forms = [example.messages, example.prompt, example.instruction, example.text]
    if sum(form is not None for form in forms) != 1:
        raise ValueError(_FORMS)
    if example.prompt is not None and example.completion is None:
        raise ValueError("a prompt without a completion")
    if example.instruction is not None and example.output is None:
        raise ValueError("an instruction without an output")
    learned = [turn.content for turn in example.turns if turn.role == "assistant"]
    if example.text is not None:
        learned = [example.text]
    if not any(text.strip() for text in learned):
        raise ValueError("nothing to learn: the assistant's messages are empty")
    texts = [example.text or "", *(turn.content for turn in example.turns)]
    if any("\0" in text for text in texts):
        raise ValueError("it contains a NUL character")


def parse(data: bytes) -> list[Example]:
    """The examples of a JSON Lines file, or of a JSON array. Raises DatasetError naming the line."""
    if len(data) > MAX_BYTES:
        raise DatasetError(f"the data set has {len(data)} bytes; the limit is {MAX_BYTES}")
    try:
        if data.lstrip()[:1] == b"[":
            return _all((f"example {i}", raw) for i, raw in enumerate(_list.decode(data), 1))
        lines = ((f"line {i}", line) for i, line in enumerate(data.split(b"\n"), 1) if line.strip())
        return _all(lines)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise DatasetError(f"the data set is not valid JSON: {error}") from None


def _all(parts: Iterable[tuple[str, bytes | msgspec.Raw]]) -> list[Example]:
    found: list[Example] = []
    for place, raw in parts:
        if len(found) == MAX_EXAMPLES:
            raise DatasetError(f"the data set has more than {MAX_EXAMPLES} examples; split it")
        if len(raw) > MAX_LINE:
            raise DatasetError(f"{place} of the data set is longer than {MAX_LINE} bytes")
        try:
            bytes(raw).decode()
            example = _decoder.decode(raw)
            check(example)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise DatasetError(f"{place} of the data set is invalid: {error}") from None
        found.append(example)
    if not found:
        raise DatasetError("the data set has no examples")
    return found


def read(root: Path, name: str) -> bytes:
    """The bytes of a data set below `root`. No symbolic link is followed. Raises DatasetError."""
    path = Path(os.path.normpath(name))
    if path.is_absolute():
        with contextlib.suppress(ValueError):
            path = path.relative_to(root)
    if "\0" in name or path.is_absolute() or not path.parts or ".." in path.parts:
        raise DatasetError(
            f"{name[:200]!r} is outside the folder of data sets; move the file to `datasets` in the data directory"
        )
    for suffix in SUFFIXES:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return _read(root, (*path.parts[:-1], path.name + suffix), name)
    known = ", ".join(repr(known) for known in list(names(root))[:12])
    raise DatasetError(
        f"data set {name[:200]!r} not found; "
        + (f"available: {known}" if known else "put the file into `datasets` in the data directory")
    )


def names(root: Path) -> Iterator[str]:
    """Names of the data sets directly in a folder."""
    with contextlib.suppress(OSError):
        for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
            if entry.is_file(follow_symlinks=False) and entry.name.endswith((".jsonl", ".json")):
                yield entry.name


def _read(root: Path, parts: tuple[str, ...], name: str) -> bytes:
    """Open each part relative to the folder before it, so that no part can be replaced by a link meanwhile."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    where = -1
    try:
        where = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            # O_NONBLOCK: opening a pipe would wait for a writer
            inner = os.open(part, flags | (os.O_NONBLOCK if last else os.O_DIRECTORY), dir_fd=where)
            os.close(where)
            where = inner
        status = os.fstat(where)
        if not stat.S_ISREG(status.st_mode):
            raise DatasetError(f"{name[:200]!r} is not a regular file; use a file of JSON lines")
        if status.st_size > MAX_BYTES:
            raise DatasetError(
                f"{name[:200]!r} has {status.st_size} bytes; the limit is {MAX_BYTES}: split it"
            )
        chunks, size = [], 0
        while chunk := os.read(where, 1 << 20):
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise DatasetError(f"{name[:200]!r} grew beyond {MAX_BYTES} bytes while it was read")
        return b"".join(chunks)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        reason = "links are not followed" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise DatasetError(f"{name[:200]!r} cannot be read: {reason}") from None
    finally:
        if where >= 0:
            os.close(where)
