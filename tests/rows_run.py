"""As `fault_run.py`, on the rows of a file `rows.json` where the command is given."""

import dataclasses
from pathlib import Path

import fault_run

from qwenvl_jax.config import DataConfig, TrainConfig

VOCABULARY = Path(__file__).parents[1] / "configs" / "nano" / "scenes.tiktoken"


def get_config() -> TrainConfig:
    data = DataConfig(
        source="rows",
        path="rows.json",
        mask="released",
        length=96,
        max_images=2,
        image_size=56,
        rows=8,
        tokenizer=str(VOCABULARY),
    )
    return dataclasses.replace(fault_run.get_config(), data=data)
