"""`python -m ttaq` is the command `ttaq`."""

import sys

from ttaq.cli import main

if __name__ == "__main__":
    sys.exit(main())
