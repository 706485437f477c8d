"""Stage 2 of the small model on wider data, new collages, and two pictures at once.

The loss of `stage2_named` was still falling. What it knew least were numbers of things, how one
lies to another, and two pictures. A fifth of the samples are now dialogues about two pictures:
half compare them, half ask what such a comparison needs, like how many stars each of them has.

    configs/nano/rows.sh more
    configs/nano/rows.sh asked
    configs/nano/rows.sh pairs
    python train.py configs/nano/stage2_pairs.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_longer_cells.py"))
    mixture = {
        f"{ROWS}/train/scenes": 0.14,
        f"{ROWS}/asked/scenes": 0.08,
        f"{ROWS}/asked/animals": 0.05,
        f"{ROWS}/asked/food": 0.04,
        f"{ROWS}/named/animals": 0.08,
        f"{ROWS}/named/food": 0.06,
        f"{ROWS}/more/animals": 0.13,
        f"{ROWS}/more/food": 0.1,
        f"{ROWS}/pairs/animals": 0.1,
        f"{ROWS}/pairs/food": 0.08,
        f"{ROWS}/cells/animals": 0.06,
        f"{ROWS}/cells/food": 0.04,
        f"{ROWS}/dialogue/animals": 0.02,
        f"{ROWS}/dialogue/food": 0.02,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_pairs",
        steps=16000,
        seed=15,
        init="runs/nano/stage2_named",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
