"""Makes the models with random weights that other benchmarks use, at their first use: `python bench/make_model.py`.

They lie in the folder `bench` of the fixtures (~/.cache/tinyoai-fixtures or TINYOAI_FIXTURES). A benchmark takes the
name of such a model in place of a file.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import fixtures

N_CTX = 4096
RECIPES: dict[str, dict[str, Any]] = {
    # 12 layers of width 768: 108 million weights with a small vocabulary, in Q8_0
    "110m": {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_ff": 3072},
    # a model for embeddings that are the mean of the token states
    "embed-30m": {"n_layer": 8, "n_embd": 512, "n_head": 8, "n_ff": 2048, "llama__pooling_type": 1},
}


def model(name: str) -> Path:
    """Returns the file of a recipe, which is made if it is missing; any other name is a file itself."""
    if name not in RECIPES:
        return Path(name)
    place = fixtures.PLACE / "bench" / f"{name}.gguf"
    if not place.exists():
        from tests.engines import make

        place.parent.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=place.parent, suffix=".part")
        os.close(handle)
        make.llama(Path(path), n_ctx=N_CTX, **RECIPES[name])
        os.replace(path, place)
    return place


if __name__ == "__main__":
    for each in RECIPES:
        print(model(each), flush=True)
