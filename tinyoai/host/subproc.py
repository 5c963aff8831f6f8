"""How this program starts itself again as another process: the interpreter, its environment, its manners, its end.

Owns that the child finds this very package, installed or in its source tree, and nothing else by
accident; what makes it safe to lose; and the words for how it ended. It must not know what the child
is for, nor start it.
"""

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

PYTHON = (sys.executable, "-P")
"""-P: a file in the folder where the server was started must not pass for one of Python's modules."""


def environment() -> dict[str, str]:
    """This process's own; with the path to this package where it is not installed but run in its source tree."""
    root = Path(__file__).parent.parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def settle(oom_score: int) -> None:
    """In the child: makes it safe to lose. Of two, the one with the higher score goes first when memory is short."""
    os.dup2(2, 1)  # the libraries print on stdout; nothing of that may be taken for ours
    # Ctrl-C and a service's stop reach all processes at once; the server decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # not Linux, or not allowed: then the kernel chooses by size alone
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(oom_score))


def ended(code: int) -> str:
    """How a child ended, in a few words that follow its name; a code below 0 is a signal's."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was ended by {name}" + (", as happens when memory runs out" if name == "SIGKILL" else "")
