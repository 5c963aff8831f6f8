"""How this program starts itself again as another process: the interpreter and its environment.

Owns that the child finds this very package, installed or in its source tree, and nothing else by
accident. It must not know what the child is for, nor start it.
"""

import os
import sys
from pathlib import Path

PYTHON = (sys.executable, "-P")
"""-P: a file in the folder where the server was started must not pass for one of Python's modules."""


def environment() -> dict[str, str]:
    """This process's own; with the path to this package where it is not installed but run in its source tree."""
    root = Path(__file__).parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return dict(os.environ)
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
