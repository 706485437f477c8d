"""Fine-tunes the adapter alone: 92 million parameters of the released weights are trained.

    python train.py configs/finetune_adapter.py --data.path=my.json --init=Qwen-VL-Chat

As `configs/finetune.py`, but the decoder is frozen: fewer parameters are trained than by the
original's LoRA (112 million), so little memory is needed beside the weights. It can teach the model
what to look at in pictures unlike those of training (scans, maps, drawings), but no other manner of
speaking.

Cost: 39 GB of weights and 1 GB of moments in float32, over all devices together. By estimate one
H100 is enough (docs/training.md); docs/pods.md has figures for 8 TPU chips.
Disk, computed: 1.1 GB a checkpoint, 38 GB of frozen weights once.
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.presets import adapter_only


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("finetune.py"))
    return dataclasses.replace(
        base, run_dir="runs/finetune_adapter", parameters=adapter_only(weight_decay=0.1)
    )
