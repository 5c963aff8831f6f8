"""GET /lora-adapters: the LoRA adapters of the default model, in the form of llama.cpp's server."""

from collections.abc import Sequence
from pathlib import PurePath

from msgspec import Struct

from tinyoai import wire
from tinyoai.api import decode
from tinyoai.models.pool import Pool
from tinyoai.web.exchange import Exchange


class LoraAdapter(Struct, kw_only=True):
    """A LoRA adapter of a model. `scale` counts in requests without `lora`."""

    id: int
    name: str
    path: str
    """The name of its file, without the folder."""
    scale: float


def listed(files: Sequence[wire.AdapterFile]) -> list[LoraAdapter]:
    """Returns the adapters of a load."""
    return [
        LoraAdapter(id=index, name=file.name, path=PurePath(file.path).name, scale=file.scale)
        for index, file in enumerate(files)
    ]


class Adapters:
    """The endpoint."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def __call__(self, exchange: Exchange) -> None:
        """Lists the adapters of the default model."""
        exchange.respond(200, decode.encode(listed(self._pool.default.load.adapters)))
