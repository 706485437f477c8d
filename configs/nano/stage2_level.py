"""Stage 2 of the small model, on from `stage2_boxed`: as many pages as `stage2_last` had.

What ships. A third of the rows are pages and a sixth drawn scenes, nearly all new, which fell
behind while `stage2_patches` and `stage2_boxed` got used to 64 queries; the rest are collages.

    configs/nano/rows.sh level
    python train.py configs/nano/stage2_level.py --model.dtype float32
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_boxed.py"))
    mixture = {
        f"{ROWS}/level/scenes": 0.16,
        f"{ROWS}/level/animals": 0.15,
        f"{ROWS}/boxed/animals": 0.10,
        f"{ROWS}/counted/animals": 0.06,
        f"{ROWS}/level/food": 0.07,
        f"{ROWS}/boxed/food": 0.04,
        f"{ROWS}/counted/food": 0.02,
        f"{ROWS}/level/english": 0.16,
        f"{ROWS}/whole/english": 0.02,
        f"{ROWS}/level/chinese": 0.15,
        f"{ROWS}/whole/chinese": 0.02,
        f"{ROWS}/whole_pairs/animals": 0.025,
        f"{ROWS}/whole_pairs/food": 0.025,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_level",
        steps=7500,
        seed=37,
        init="runs/nano/stage2_boxed",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
