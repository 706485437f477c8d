"""Stage 2 of the small model, on from `stage2_boxed`: a short stage with more drawn scenes.

Does not ship: drawn scenes come back in part, pages do not (docs/nano.md). `stage2_boxed` had six
drawn scenes in a hundred rows; here a quarter are.

    python train.py configs/nano/stage2_even.py --model.dtype float32
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_boxed.py"))
    mixture = {
        f"{ROWS}/whole/scenes": 0.26,
        f"{ROWS}/boxed/animals": 0.22,
        f"{ROWS}/boxed/food": 0.09,
        f"{ROWS}/counted/animals": 0.06,
        f"{ROWS}/counted/food": 0.03,
        f"{ROWS}/whole/animals": 0.06,
        f"{ROWS}/whole/food": 0.03,
        f"{ROWS}/whole/english": 0.10,
        f"{ROWS}/whole/chinese": 0.10,
        f"{ROWS}/whole_pairs/animals": 0.025,
        f"{ROWS}/whole_pairs/food": 0.025,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_even",
        steps=1100,
        seed=36,
        init="runs/nano/stage2_boxed",
        optimizer=dataclasses.replace(base.optimizer, peak_lr=3e-4, warmup_steps=50),
        data=dataclasses.replace(base.data, mixture=mixture),
    )
