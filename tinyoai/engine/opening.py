"""Opens a model on the engine that its load names. Only the worker imports this; each engine loads on first use."""

from tinyoai import wire
from tinyoai.engine.contract import Engine, EngineError


def open_engine(load: wire.Load) -> Engine:
    """A loaded and warmed-up model. Raises ModelRefused or EngineError with one sentence for the user."""
    if load.engine == "fake":
        from tinyoai.engine import fake

        return fake.open_engine(load)
    if load.engine == "ctransformers":
        from tinyoai.engine.ctransformers import opening

        return opening.open_engine(load)
    raise EngineError(f"there is no engine {load.engine!r}")
