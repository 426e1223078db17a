"""``python -m far.cli``: the same as the command ``far``."""

import sys

from far.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
