"""Trains Qwen-VL: `python train.py configs/nano/stage1.py [--a.b=c ...]`; see `--help`."""

from qwenvl_jax.cli.errors import leave
from qwenvl_jax.cli.train import main

if __name__ == "__main__":
    leave(main())
