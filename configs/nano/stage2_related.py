"""Stage 2 of the small model, on from `stage2_last`: how one thing lies to another.

More than half of the rows ask for it, in drawn scenes, at a rate as high as that of the first
stages: with a few in a hundred the answers stayed those of chance (docs/nano.md).

    configs/nano/rows.sh related
    python train.py configs/nano/stage2_related.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_last.py"))
    mixture = {
        f"{ROWS}/related/scenes": 0.55,
        f"{ROWS}/fresh/scenes": 0.15,
        f"{ROWS}/last/animals": 0.15,
        f"{ROWS}/last/english": 0.075,
        f"{ROWS}/last/chinese": 0.075,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_related",
        steps=2500,
        seed=31,
        init="runs/nano/stage2_last",
        optimizer=dataclasses.replace(base.optimizer, peak_lr=8e-4, warmup_steps=100),
        data=dataclasses.replace(base.data, mixture=mixture),
    )
