"""Converts weights: `python convert.py import|export SRC DST`; see `--help`."""

from qwenvl_jax.cli.convert import main
from qwenvl_jax.cli.errors import leave

if __name__ == "__main__":
    leave(main())
