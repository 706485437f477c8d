"""Stage 2 of the small model, on from `stage2_related`: everything again, in its proportions.

More than a fifth of the rows still ask how one thing lies to another; the rest are those of the
stages before.

    configs/nano/rows.sh related_more
    python train.py configs/nano/stage2_joined.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_related.py"))
    mixture = {
        f"{ROWS}/related_more/scenes": 0.22,
        f"{ROWS}/fresh/scenes": 0.03,
        f"{ROWS}/lines/scenes": 0.03,
        f"{ROWS}/asked/scenes": 0.01,
        f"{ROWS}/last/animals": 0.11,
        f"{ROWS}/close/animals": 0.05,
        f"{ROWS}/fresh/animals": 0.07,
        f"{ROWS}/asked/animals": 0.02,
        f"{ROWS}/last/food": 0.03,
        f"{ROWS}/fresh/food": 0.04,
        f"{ROWS}/asked/food": 0.01,
        f"{ROWS}/last/english": 0.09,
        f"{ROWS}/close/english": 0.04,
        f"{ROWS}/letters/english": 0.02,
        f"{ROWS}/last/chinese": 0.085,
        f"{ROWS}/close/chinese": 0.035,
        f"{ROWS}/signs/chinese": 0.02,
        f"{ROWS}/last_pairs/animals": 0.035,
        f"{ROWS}/last_pairs/food": 0.03,
        f"{ROWS}/fresh_chat/animals": 0.01,
        f"{ROWS}/fresh_chat/food": 0.005,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_joined",
        steps=6500,
        seed=32,
        init="runs/nano/stage2_related",
        optimizer=dataclasses.replace(base.optimizer, peak_lr=5e-4),
        data=dataclasses.replace(base.data, mixture=mixture),
    )
