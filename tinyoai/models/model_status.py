"""The state of a model, as clients and metrics see it."""

import enum

from msgspec import Struct

from tinyoai import wire


class State(enum.Enum):
    """State of a model."""

    LOADING = "loading"
    READY = "ready"
    WAITING = "waiting"
    FAILED = "failed"
    UNLOADED = "unloaded"


class ModelStatus(Struct, frozen=True, kw_only=True):
    """A snapshot of one model. Sizes are in bytes, times in seconds."""

    name: str
    state: State
    reason: str
    """The reason for this state; may be empty."""
    reserved: bool
    """Its memory counts against the budget."""
    estimated_bytes: int
    keep_alive_s: float
    """Seconds that it stays loaded without a lease; negative: forever."""
    unload_pending: bool
    """It is unloaded when its running answers are finished."""
    unloads_in_s: float | None
    """Until the keep-alive ends; None while that does not run."""
    n_leases: int
    n_answers: int
    n_deaths: int
    """Of its processes, since the server started."""
    tokens_per_second: float | None
    """Decode speed of one stream over the last answers; None before the first."""
    last_used: int | None
    """Unix seconds when the last lease ended."""
    pid: int | None
    """None: no process is ready. So with all below."""
    ready: wire.Ready | None
    uptime_s: float
    n_running: int
    """Requests that have a slot."""
    n_queued: int
    n_threads: int
    """Threads that the process may use for a step, by the last grant; 0: it had no work yet."""
