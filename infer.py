"""Answers about pictures: `python infer.py --image street.jpg "What is it?"`; see `--help`."""

from qwenvl_jax.cli.errors import leave
from qwenvl_jax.cli.infer import main

if __name__ == "__main__":
    leave(main())
