"""Stage 2 of the small model, on from `stage2_read`: pages still, and what that stage lost.

It begins with a decoder that reads, at a lower rate than where it learned to, with
fewer lists of letters and more of the rest. Drawn scenes have more questions on how one thing lies
to another, two thirds of them open ones (`Where is the star from the ring?`): yes and no alone did
not teach it.

    configs/nano/rows.sh asked
    configs/nano/rows.sh related
    python train.py configs/nano/stage2_pages.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_read.py"))
    mixture = {
        f"{ROWS}/fresh/scenes": 0.1,
        f"{ROWS}/asked/scenes": 0.05,
        f"{ROWS}/related/scenes": 0.05,
        f"{ROWS}/fresh/animals": 0.24,
        f"{ROWS}/asked/animals": 0.03,
        f"{ROWS}/fresh/food": 0.1,
        f"{ROWS}/asked/food": 0.02,
        f"{ROWS}/fresh/english": 0.13,
        f"{ROWS}/letters/english": 0.14,
        f"{ROWS}/fresh_pairs/animals": 0.05,
        f"{ROWS}/fresh_pairs/food": 0.04,
        f"{ROWS}/fresh_chat/animals": 0.03,
        f"{ROWS}/fresh_chat/food": 0.02,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_pages",
        steps=7200,
        seed=18,
        init="runs/nano/stage2_read",
        data=dataclasses.replace(base.data, mixture=mixture),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=4e-4),
    )
