"""Child processes of this program: command line, environment, isolation and exit messages.

A child imports this same package, installed or in its source tree, and nothing from the current folder.
"""

import contextlib
import os
import resource
import signal
import sys
from pathlib import Path

PYTHON = (sys.executable, "-P")
"""-P: a file in the current folder must not shadow one of Python's modules."""

WARNING = "warning: "
"""The beginning of a child's line of output that people should see."""

_SIGNALS = {
    "SIGKILL": ", as happens when memory runs out",
    "SIGALRM": ", as happens when a chat template does not end",
}


def environment() -> dict[str, str]:
    """This process's environment, with PYTHONPATH set if the package runs in its source tree."""
    root = Path(__file__).parent.parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def isolate(oom_score: int) -> None:
    """In the child: ignores terminal signals, disables core dumps, sends stdout to stderr and sets oom_score_adj.

    When memory runs out, the kernel kills the process with the highest score first.
    """
    os.dup2(2, 1)  # native libraries print on stdout, which belongs to the server
    # Ctrl-C and a service manager signal all processes at once; the server stops its children itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # not Linux, or not allowed: the kernel chooses by size alone
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(oom_score))


def describe_exit(code: int) -> str:
    """Returns the end of a child process in words that follow its name. A negative code is a signal's number."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was ended by {name}{_SIGNALS.get(name, '')}"
