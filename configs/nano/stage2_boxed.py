"""Stage 2 of the small model, on from `stage2_patches`: new collages to be named, most with boxes.

Better than `stage2_last` on collages, behind it on drawn scenes and pages, which are a quarter of
its rows (docs/nano.md).

    configs/nano/rows.sh boxed
    python train.py configs/nano/stage2_boxed.py --model.dtype float32
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_patches.py"))
    mixture = {
        f"{ROWS}/boxed/animals": 0.29,
        f"{ROWS}/boxed/food": 0.12,
        f"{ROWS}/counted/animals": 0.09,
        f"{ROWS}/counted/food": 0.04,
        f"{ROWS}/whole/scenes": 0.06,
        f"{ROWS}/whole/animals": 0.09,
        f"{ROWS}/whole/food": 0.04,
        f"{ROWS}/whole/english": 0.10,
        f"{ROWS}/whole/chinese": 0.11,
        f"{ROWS}/whole_pairs/animals": 0.03,
        f"{ROWS}/whole_pairs/food": 0.03,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_boxed",
        steps=7000,
        seed=35,
        init="runs/nano/stage2_patches",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
