"""Stage 2 of the small model, on from `stage2_pages`: Chinese pages, and all the rest for longer.

Chinese pages begin as English ones did, with lists of what stands in each cell, one
sign a token. Products of matrices are taken in bfloat16, which processors with units for it do 1.6
times as fast; the weights and their moments stay in float32.

    configs/nano/rows.sh pages
    configs/nano/rows.sh signs
    python train.py configs/nano/stage2_signs.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_pages.py"))
    mixture = {
        f"{ROWS}/fresh/scenes": 0.1,
        f"{ROWS}/asked/scenes": 0.03,
        f"{ROWS}/fresh/animals": 0.22,
        f"{ROWS}/asked/animals": 0.02,
        f"{ROWS}/fresh/food": 0.13,
        f"{ROWS}/asked/food": 0.02,
        f"{ROWS}/fresh/english": 0.06,
        f"{ROWS}/pages/english": 0.08,
        f"{ROWS}/letters/english": 0.06,
        f"{ROWS}/pages/chinese": 0.08,
        f"{ROWS}/signs/chinese": 0.09,
        f"{ROWS}/fresh_pairs/animals": 0.04,
        f"{ROWS}/fresh_pairs/food": 0.03,
        f"{ROWS}/fresh_chat/animals": 0.02,
        f"{ROWS}/fresh_chat/food": 0.02,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_signs",
        steps=10000,
        seed=19,
        init="runs/nano/stage2_pages",
        model=dataclasses.replace(base.model, dtype="bfloat16"),
        data=dataclasses.replace(base.data, mixture=mixture),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=5e-4),
    )
