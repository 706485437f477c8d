"""Stage 2 of the small model on new collages and on pages: names again, and how to read.

It began to read pages, and lost some of what it knew, which `stage2_pages` brought back
(docs/nano.md). Of 100 rows 38 are pages, most of them lists of the letters that stand in each cell:
from answers alone the words on pages were not learned in 1,150 steps.

    configs/nano/rows.sh fresh
    configs/nano/rows.sh fresh_pairs
    configs/nano/rows.sh fresh_chat
    configs/nano/rows.sh letters
    python train.py configs/nano/stage2_read.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_finer.py"))
    mixture = {
        f"{ROWS}/fresh/scenes": 0.11,
        f"{ROWS}/fresh/animals": 0.24,
        f"{ROWS}/fresh/food": 0.11,
        f"{ROWS}/fresh/english": 0.12,
        f"{ROWS}/letters/english": 0.26,
        f"{ROWS}/fresh_pairs/animals": 0.06,
        f"{ROWS}/fresh_pairs/food": 0.05,
        f"{ROWS}/fresh_chat/animals": 0.03,
        f"{ROWS}/fresh_chat/food": 0.02,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_read",
        steps=6700,
        seed=17,
        init="runs/nano/stage2_finer",
        data=dataclasses.replace(base.data, mixture=mixture, max_images=4),
    )
