"""Stage 2 of the small model on wider data, fifth part: longer, with more dialogue.

The loss of `stage2_longer_cells` was still falling, and two pictures were the hardest to compare.

    python train.py configs/nano/stage2_last_cells.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_longer_cells.py"))
    shares = {
        f"{ROWS}/cells/animals": 0.07,
        f"{ROWS}/cells/food": 0.05,
        f"{ROWS}/dialogue/animals": 0.08,
        f"{ROWS}/dialogue/food": 0.08,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_last_cells",
        steps=6000,
        seed=13,
        init="runs/nano/stage2_longer_cells",
        data=dataclasses.replace(base.data, mixture=base.data.mixture | shares),
    )
