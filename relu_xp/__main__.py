"""``python -m relu_xp``: the command line."""

import sys

from relu_xp.cli import main

if __name__ == "__main__":
    sys.exit(main())
