"""Stage 2 of the small model, on from `stage2_lines`: new pages, and animals to be named.

New rows of what it still read or named too poorly, each seen once or twice; the rest
from earlier rows, so that nothing is lost.

    configs/nano/rows.sh close
    python train.py configs/nano/stage2_close.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_lines.py"))
    mixture = {
        f"{ROWS}/fresh/scenes": 0.04,
        f"{ROWS}/lines/scenes": 0.06,
        f"{ROWS}/asked/scenes": 0.03,
        f"{ROWS}/fresh/animals": 0.06,
        f"{ROWS}/close/animals": 0.2,
        f"{ROWS}/asked/animals": 0.02,
        f"{ROWS}/fresh/food": 0.09,
        f"{ROWS}/asked/food": 0.01,
        f"{ROWS}/fresh/english": 0.03,
        f"{ROWS}/close/english": 0.16,
        f"{ROWS}/letters/english": 0.03,
        f"{ROWS}/lines/chinese": 0.02,
        f"{ROWS}/close/chinese": 0.12,
        f"{ROWS}/signs/chinese": 0.04,
        f"{ROWS}/fresh_pairs/animals": 0.04,
        f"{ROWS}/fresh_pairs/food": 0.025,
        f"{ROWS}/fresh_chat/animals": 0.015,
        f"{ROWS}/fresh_chat/food": 0.01,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_close",
        steps=12000,
        seed=21,
        init="runs/nano/stage2_lines",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
