"""`python -m tinyoai`: the same as the `tinyoai` command.

It owns nothing but the exit code.
It must not know what the command does.
"""

import sys

from tinyoai.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
