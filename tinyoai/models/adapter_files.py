"""The LoRA adapters of a model: named by --lora or in the settings file, and checked against the model.

Messages name a file without its folder, since they reach clients.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from tinyoai import gguf
from tinyoai.engine import facts
from tinyoai.wire import MAX_ADAPTER_SCALE, AdapterFile

MAX_ADAPTERS = 32
"""Adapters of one model."""
MAX_NAME = 100
"""Characters of an adapter's name."""


class AdapterSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter in a settings file. A relative path counts from there; the name is by default the file's stem."""

    file: str
    scale: float = 1.0
    name: str = ""


class _Named(Struct):
    """The part of a settings file that is of use here."""

    lora: tuple[AdapterSettings, ...] = ()


def from_flags(texts: Sequence[str]) -> tuple[AdapterSettings, ...]:
    """The adapters of --lora: each a FILE, or FILE=SCALE. Raises ValueError in words that follow the flag."""
    found = []
    for text in texts:
        file, scale = text, 1.0
        if not Path(text).expanduser().is_file():
            before, equals, after = text.rpartition("=")
            if equals:
                file = before
                try:
                    scale = float(after)
                except ValueError:
                    raise ValueError(
                        f"{text!r}: {after!r} is not a number; write FILE=SCALE, such as a.gguf=0.5"
                    ) from None
        path = Path(file).expanduser().absolute()
        if not path.is_file():
            raise ValueError(f"{path} is not a file; name the GGUF file of a LoRA adapter")
        found.append(AdapterSettings(file=str(path), scale=scale))
    return tuple(found)


def named_in(settings_file: Path) -> tuple[AdapterSettings, ...]:
    """The adapters that a settings file names; none if it cannot be read."""
    try:
        return msgspec.json.decode(settings_file.read_bytes(), type=_Named).lora
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return ()


def stamp(wanted: Sequence[AdapterSettings], folder: Path) -> str:
    """A text that changes when one of the files, or what is wanted of it, changes."""
    known = []
    for each in wanted:
        try:
            status = os.stat(folder / each.file)
            seen = f"{status.st_size}:{status.st_mtime_ns}"
        except (OSError, ValueError):
            seen = "missing"
        known.append(f"{each.file!r}:{each.name!r}:{each.scale!r}:{seen}")
    return ",".join(known)


def read(
    wanted: Sequence[AdapterSettings], folder: Path, model: gguf.Header | None, engine: str
) -> tuple[AdapterFile, ...]:
    """The adapters for a load, checked; `model` is None for a legacy file. Raises gguf.BadModelFile."""
    found: dict[str, AdapterFile] = {}
    if len(wanted) > MAX_ADAPTERS:
        raise gguf.BadModelFile(f"it has {len(wanted)} LoRA adapters; at most {MAX_ADAPTERS} are possible")
    for each in wanted:
        path = folder / each.file
        name = each.name or path.stem
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise gguf.BadModelFile(
                f"the LoRA adapter {path.name!a} needs a shorter, printable name; rename the file"
            )
        if name in found:
            raise gguf.BadModelFile(
                f"two LoRA adapters have the name {name!r}; rename a file, or name one of them once"
            )
        if not math.isfinite(each.scale) or abs(each.scale) > MAX_ADAPTER_SCALE:
            most = f"{MAX_ADAPTER_SCALE:g}"
            raise gguf.BadModelFile(
                f"the LoRA adapter {name!r} has the scale {each.scale:g}; choose one between -{most} and {most}"
            )
        found[name] = AdapterFile(
            name=name, path=str(path), scale=each.scale, size=_check(path, model, engine)
        )
    return tuple(found.values())


def _check(path: Path, model: gguf.Header | None, engine: str) -> int:
    """The size of an adapter's file in bytes. Raises gguf.BadModelFile if it does not fit the model."""
    if model is None:
        raise gguf.BadModelFile(
            f"{path.name} is a LoRA adapter, which a legacy GGML file cannot have; leave it out"
        )
    try:
        str(path).encode()
        adapter = gguf.read_header(path)
    except gguf.BadModelFile as error:
        raise gguf.BadModelFile(f"the LoRA adapter {str(error).replace(str(path), path.name)}") from None
    except UnicodeEncodeError:
        raise gguf.BadModelFile(
            f"the path of the LoRA adapter {path.name!a} is not UTF-8; rename it"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise gguf.BadModelFile(f"the LoRA adapter {path.name} cannot be read: {reason}") from None
    reason = facts.ENGINES[engine].supports_adapter(adapter, model)
    if reason is not None:
        raise gguf.BadModelFile(f"the LoRA adapter {path.name} {reason}")
    return adapter.file_size
