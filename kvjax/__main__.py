"""Runs the command line by `python -m kvjax`."""

import sys

from kvjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
