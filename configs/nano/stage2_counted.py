"""Stage 2 of the small model, on from `stage2_last`: how many, and what there is.

A third of the rows are questions about collages, most on numbers and on what there is or is not:
half of what `stage2_last` got wrong among animals were numbers. The rest are new rows of every
kind.

    configs/nano/rows.sh counted
    configs/nano/rows.sh whole
    configs/nano/rows.sh whole_pairs
    python train.py configs/nano/stage2_counted.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_last.py"))
    mixture = {
        f"{ROWS}/counted/animals": 0.25,
        f"{ROWS}/counted/food": 0.07,
        f"{ROWS}/whole/scenes": 0.08,
        f"{ROWS}/whole/animals": 0.24,
        f"{ROWS}/whole/food": 0.09,
        f"{ROWS}/whole/english": 0.11,
        f"{ROWS}/whole/chinese": 0.09,
        f"{ROWS}/whole_pairs/animals": 0.04,
        f"{ROWS}/whole_pairs/food": 0.03,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_counted",
        steps=4200,
        seed=33,
        init="runs/nano/stage2_last",
        optimizer=dataclasses.replace(base.optimizer, peak_lr=4e-4, warmup_steps=100),
        data=dataclasses.replace(base.data, mixture=mixture),
    )
