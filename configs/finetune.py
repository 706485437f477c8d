"""Fine-tunes released weights on a conversation file, as the original `finetune.py` does.

    python train.py configs/finetune.py --data.path=my.json --init=Qwen-VL-Chat

`my.json` is the original's format: a list of conversations with `<img>` and `<box>` tags in the
text. Look at it first: qwenvl data lint my.json. The folder gives the vocabulary too; the result,
`--run-dir`, is a model for `qwenvl chat`; docs/conversion.md tells the way back to PyTorch.

The values are those of `finetune_ds.sh`: rate 1e-5, cosine, weight decay 0.1, beta2 0.95, 2,048
tokens, 128 sequences a step, bf16, full recomputation in the backward pass, the tower frozen.
Differs: dialogues are packed, so a step holds more than 128 of them where they are short; and the
length of a run is in steps, not epochs. Five epochs of n dialogues are 5 n / 128 steps if each has
a row of its own: 500 steps are right for about 13,000 dialogues. For another number set --steps and
--optimizer.warmup-steps (docs/training.md, How many steps).

Cost: the decoder and most of the adapter are trained, 7.8 of 9.7 billion parameters. Weights and
moments take 101 GB in float32 over all devices together; gradients and activations come on top. By
estimate four H100 are enough and two are not (docs/training.md, Fine-tuning). The values below suit
up to 8 devices; on 16 add --micro-batches=8 or --mesh.tensor=2.
Disk, computed: 94 GB a checkpoint, 12 bytes a trained parameter; three are kept, and for a moment a
fourth: 375 GB, and 7 GB of frozen weights once.
Expect: the loss of the first steps tells whether the prompt format is right: below 2 for ordinary
dialogues.
"""

import dataclasses

from qwenvl_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from qwenvl_jax.presets import qwen_vl, released_finetune


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/finetune",
        steps=500,
        seed=0,
        init="Qwen-VL-Chat",
        model=dataclasses.replace(
            qwen_vl(), dtype="bfloat16", attention_backend="auto", remat="full"
        ),
        data=DataConfig(
            source="rows",
            path="my.json",
            mask="released",  # ChatML's own tokens of every turn count, as in the original
            cut_turns=True,  # the original cuts the ids, also inside a picture
            length=2048,
            max_images=7,
            image_size=448,
            rows=128,
            tokenizer="",  # that of `init`
        ),
        optimizer=OptimizerConfig(
            peak_lr=1e-5,
            end_lr=0.0,
            warmup_steps=5,  # the original's ratio of 0.01
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            clip_norm=1.0,
        ),
        parameters=released_finetune(weight_decay=0.1),
        micro_batches=16,
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        checkpoint=CheckpointConfig(every_steps=100, keep=3),
    )
