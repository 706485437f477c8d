"""Stage 2 of the small model on wider data, sixth part: what is in a collage, named with its box.

The hardest questions of `stage2_last_cells` were names: of things in a box, and in captions with
boxes. 160,000 rows of new collages ask for little else, and are two fifths of the samples.

    configs/nano/rows.sh named
    python train.py configs/nano/stage2_named.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_longer_cells.py"))
    mixture = {
        f"{ROWS}/train/scenes": 0.26,
        f"{ROWS}/train/animals": 0.08,
        f"{ROWS}/train/food": 0.06,
        f"{ROWS}/named/animals": 0.22,
        f"{ROWS}/named/food": 0.18,
        f"{ROWS}/cells/animals": 0.07,
        f"{ROWS}/cells/food": 0.05,
        f"{ROWS}/dialogue/animals": 0.04,
        f"{ROWS}/dialogue/food": 0.04,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_named",
        steps=12000,
        seed=14,
        init="runs/nano/stage2_last_cells",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
