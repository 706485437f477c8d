"""Stage 2 of the small model, on from `stage2_signs`: lines of pages, and drawn scenes once more.

New pages, most of them to be read, one line or all; and new drawn scenes, which had
lost a little while the pages were learned.

    configs/nano/rows.sh lines
    python train.py configs/nano/stage2_lines.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_signs.py"))
    mixture = {
        f"{ROWS}/lines/scenes": 0.15,
        f"{ROWS}/asked/scenes": 0.03,
        f"{ROWS}/fresh/animals": 0.19,
        f"{ROWS}/asked/animals": 0.02,
        f"{ROWS}/fresh/food": 0.1,
        f"{ROWS}/asked/food": 0.015,
        f"{ROWS}/fresh/english": 0.04,
        f"{ROWS}/pages/english": 0.04,
        f"{ROWS}/lines/english": 0.14,
        f"{ROWS}/letters/english": 0.04,
        f"{ROWS}/lines/chinese": 0.1,
        f"{ROWS}/signs/chinese": 0.05,
        f"{ROWS}/fresh_pairs/animals": 0.03,
        f"{ROWS}/fresh_pairs/food": 0.02,
        f"{ROWS}/fresh_chat/animals": 0.02,
        f"{ROWS}/fresh_chat/food": 0.015,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_lines",
        steps=9500,
        seed=20,
        init="runs/nano/stage2_signs",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
