"""Converts weights: `python convert.py import|export SRC DST`; see `--help`."""

import sys

from qwenvl_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
