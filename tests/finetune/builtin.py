"""The built-in model's path, and samples for it."""

from pathlib import Path

import tinyoai
from tinyoai.engine.ctransformers.engine import CTransformersEngine
from tinyoai.finetune import samples
from tinyoai.finetune.dataset import Example
from tinyoai.finetune.protocol import JobSpec
from tinyoai.finetune.samples import Sample
from tinyoai.finetune.train_config import TrainConfig

BUILTIN = Path(tinyoai.__file__).parent / "builtin" / "tinyoai-chat.gguf"
FRANCE = ("What is the capital of France?", "The capital of France is Paris.")
KEY = ("Where is the key?", "Under the blue mat.")
GATE = ("Who guards the gate?", "An old dog named Rufo.")
CHAT = JobSpec(path="", template="chatml", chat=True, out="", config=TrainConfig())


def tokenize(engine: CTransformersEngine, example: Example, spec: JobSpec = CHAT) -> list[Sample]:
    """Returns the samples of an example."""
    return samples.tokenize(example, engine.encode, engine.info, spec)


def taught(engine: CTransformersEngine, *pairs: tuple[str, str]) -> list[Sample]:
    """Returns the samples of questions and answers."""
    found = [tokenize(engine, Example(prompt=asked, completion=said)) for asked, said in pairs]
    return [sample for one in found for sample in one]
