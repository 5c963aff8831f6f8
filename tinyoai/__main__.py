"""`python -m tinyoai` is the `tinyoai` command."""

import sys

from tinyoai.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
