"""Opens a model with the engine that a load names. Only a worker imports this; engines are imported on first use."""

from tinyoai import wire
from tinyoai.engine.contract import Engine, EngineError


def open_engine(load: wire.Load) -> Engine:
    """A loaded and warmed-up model. Raises ModelRefused or EngineError with one sentence for the user."""
    if load.engine == "fake":
        from tinyoai.engine.fake import FakeEngine

        return FakeEngine(name=load.name, n_ctx=load.n_ctx, n_slots=load.n_slots, n_batch=load.n_batch)
    if load.engine == "ctransformers":
        from tinyoai.engine.ctransformers import opening

        return opening.open_engine(load)
    if load.engine == "llamacpp":
        from tinyoai.engine.llamacpp import opening as llamacpp

        return llamacpp.open_engine(load)
    raise EngineError(f"there is no engine {load.engine!r}")
