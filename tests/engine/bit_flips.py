"""Copies of a model file with flipped bits in the header, of which an engine accepts some."""

import random
from collections.abc import Callable
from pathlib import Path

from tinyoai import gguf


def accepted(
    sound: Path, folder: Path, supports: Callable[[gguf.Header], str | None], *, n: int, seed: int
) -> list[str]:
    """Writes n copies with one to three flipped bits each; returns the paths of those that `supports` accepts."""
    whole, draw, data_at = sound.read_bytes(), random.Random(seed), gguf.read_header(sound).data_at
    found: list[str] = []
    for number in range(n):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(data_at)] ^= 1 << draw.randrange(8)
        path = folder / f"{number}.gguf"
        path.write_bytes(changed)
        try:
            reason = supports(gguf.read_header(path))
        except gguf.BadModelFile:
            reason = "not a model file"
        if reason is None:
            found.append(str(path))
        else:
            path.unlink()
    return found
