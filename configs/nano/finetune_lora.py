"""Fine-tunes the model that comes with the package with LoRA: to try it on a laptop.

    python train.py configs/nano/finetune_lora.py --data.path=my.json
    qwenvl chat --model runs/nano/finetune_lora
    python convert.py adapter runs/nano/finetune_lora adapter

As `configs/nano/finetune.py`, with LoRA pairs beside the decoder's matrices, which are frozen.

Cost: 3 minutes, 0.54 s a step, on two cores.
Expect: on the six dialogues of tests/data/conversations/shelf.json the loss falls to 0.53 at step
50, and hardly below: they have `<`, `>`, `&` and `;`, which the small model never wrote, and LoRA
leaves the head as it is. All else it knows by heart.
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
