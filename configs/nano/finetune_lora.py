"""Fine-tunes the model that comes with the package with LoRA: to try it on a laptop.

    python train.py configs/nano/finetune_lora.py --data.path=my.json
    qwenvl chat --model runs/nano/finetune_lora
    python convert.py adapter runs/nano/finetune_lora adapter

As `configs/nano/finetune.py`, with LoRA pairs beside the decoder's matrices, which are frozen.

Cost: 9 minutes, computed from 40 steps of 1.8 s on two cores that other work shared.
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.presets import lora_only, released_lora


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("finetune.py"))
    lora = dataclasses.replace(released_lora(), rank=16)
    return dataclasses.replace(
        base,
        run_dir="runs/nano/finetune_lora",
        model=dataclasses.replace(base.model, lora=lora),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=2e-3),
        parameters=lora_only(weight_decay=0.1),
    )
