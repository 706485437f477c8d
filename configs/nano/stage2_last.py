"""Stage 2 of the small model, on from `stage2_close`: animals to be named, new pages and new pairs.

More than a quarter of the rows are new collages of animals, most to be told with boxes; the rest
are new pages and dialogues about two collages, and earlier rows, so that nothing is lost.

    configs/nano/rows.sh last
    configs/nano/rows.sh last_pairs
    python train.py configs/nano/stage2_last.py
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_close.py"))
    mixture = {
        f"{ROWS}/fresh/scenes": 0.04,
        f"{ROWS}/lines/scenes": 0.05,
        f"{ROWS}/asked/scenes": 0.03,
        f"{ROWS}/last/animals": 0.27,
        f"{ROWS}/close/animals": 0.04,
        f"{ROWS}/asked/animals": 0.02,
        f"{ROWS}/last/food": 0.065,
        f"{ROWS}/fresh/food": 0.03,
        f"{ROWS}/asked/food": 0.01,
        f"{ROWS}/last/english": 0.11,
        f"{ROWS}/close/english": 0.05,
        f"{ROWS}/letters/english": 0.025,
        f"{ROWS}/last/chinese": 0.11,
        f"{ROWS}/close/chinese": 0.04,
        f"{ROWS}/signs/chinese": 0.03,
        f"{ROWS}/last_pairs/animals": 0.035,
        f"{ROWS}/last_pairs/food": 0.03,
        f"{ROWS}/fresh_chat/animals": 0.01,
        f"{ROWS}/fresh_chat/food": 0.005,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_last",
        steps=11000,
        seed=22,
        init="runs/nano/stage2_close",
        data=dataclasses.replace(base.data, mixture=mixture),
    )
