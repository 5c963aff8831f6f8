"""Opens a model with the engine that a load names. Only a worker imports this."""

from tinyoai import wire
from tinyoai.engine.contract import Engine


def open_engine(load: wire.Load) -> Engine:
    """The opened model. Raises EngineError with one sentence for the user."""
    from tinyoai.engine.fake import FakeEngine

    return FakeEngine(name=load.name, n_ctx=load.n_ctx, n_slots=load.n_slots, n_batch=load.n_batch)
