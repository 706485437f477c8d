"""Fine-tunes released weights with LoRA: 129 million parameters beside a decoder that stays.

    python train.py configs/finetune_lora.py --data.path=my.json --init=Qwen-VL-Chat

As `configs/finetune.py`, with the values of `finetune_lora_ds.sh`: LoRA pairs of rank 64 beside the
decoder's attention and the first two matrices of its MLP. Frozen weights are kept in bfloat16. The
result can be used as any other model: `qwenvl chat`, `python convert.py import` and a later
`--init` merge the pairs automatically.
Differs: queries, keys and values have a pair each. Dropout is 0.05, as in the original.

For the base model, Qwen-VL, train the embeddings and the head too, as the original does: the base
model has not learned the tokens that mark the turns of a dialogue. That is another 1,245 million
parameters, and needs a config of your own:

    def get_config() -> TrainConfig:
        base = load_config("configs/finetune_lora.py")
        rules = lora_only(weight_decay=0.1, with_embeddings=True)
        return dataclasses.replace(base, run_dir="runs/base_lora", parameters=rules)

with the imports of this file, and `--init=Qwen-VL`.

Cost: 19 GB of frozen weights and 1.5 GB of pairs with their moments, over all devices together. By
estimate one A100 of 40 GB is enough (docs/training.md); docs/pods.md has figures for 8 TPU chips.
Disk, computed: 1.5 GB a checkpoint, 19 GB of frozen weights once.
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig
from qwenvl_jax.presets import lora_only, released_lora


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("finetune.py"))
    return dataclasses.replace(
        base,
        run_dir="runs/finetune_lora",
        model=dataclasses.replace(base.model, lora=released_lora()),
        parameters=lora_only(weight_decay=0.1),
        frozen_dtype="bfloat16",
    )
