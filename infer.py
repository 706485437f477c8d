"""Answers about pictures: `python infer.py --image street.jpg "What is it?"`; see `--help`."""

import sys

from qwenvl_jax.cli.infer import main

if __name__ == "__main__":
    sys.exit(main())
