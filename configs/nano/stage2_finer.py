"""Stage 2 of the small model on wider data, with more queries: a finer look at a picture.

With 16 queries boxes were wrong where more than two things lie in a collage, however long it was
trained. Here a picture has 36. They begin between those that `stage2_pairs` learned, and after 500
steps the losses of boxes are where the old grid is after as many.

    python convert.py import runs/nano/stage2_pairs runs/nano/paired
    python convert.py queries runs/nano/paired 36 runs/nano/finer_start
    python train.py configs/nano/stage2_finer.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.presets import nano

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_longer_cells.py"))
    mixture = {
        f"{ROWS}/train/scenes": 0.14,
        f"{ROWS}/asked/scenes": 0.08,
        f"{ROWS}/asked/animals": 0.05,
        f"{ROWS}/asked/food": 0.04,
        f"{ROWS}/named/animals": 0.12,
        f"{ROWS}/named/food": 0.09,
        f"{ROWS}/more/animals": 0.1,
        f"{ROWS}/more/food": 0.08,
        f"{ROWS}/pairs/animals": 0.11,
        f"{ROWS}/pairs/food": 0.09,
        f"{ROWS}/cells/animals": 0.04,
        f"{ROWS}/cells/food": 0.03,
        f"{ROWS}/dialogue/animals": 0.015,
        f"{ROWS}/dialogue/food": 0.015,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_finer",
        steps=13000,
        seed=16,
        init="runs/nano/finer_start",
        model=nano(num_queries=36),
        data=dataclasses.replace(base.data, mixture=mixture, rows=8),
    )
