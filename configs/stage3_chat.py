"""Stage 3 of the paper: dialogues in ChatML, the tower frozen (Table 8).

    python train.py configs/stage3_chat.py

Cost: 8,000 steps of 128 rows, 1e20 FLOP; at half of the peak rate under 60 H100 hours (a
calculation).
Disk, computed: 94 GB a checkpoint, 12 bytes a trained parameter; three are kept, for a moment
four: 375 GB, and 7 GB of frozen weights once.
Expect: more than a third of the steps are warm-up, as in the paper.

The paper's 350,000 dialogues are not published: give your own with --data.path=my.json
"""

import dataclasses

from qwenvl_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import qwen_vl, stage_3


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/stage3",
        steps=8_000,
        seed=0,
        init="runs/stage2",
        model=dataclasses.replace(
            qwen_vl(), dtype="bfloat16", attention_backend="auto", remat="dots"
        ),
        data=DataConfig(
            source="rows",
            path="rows/chat.json",
            length=2048,
            max_images=7,
            image_size=448,
            rows=128,
            tokenizer="weights/start",
        ),
        optimizer=OptimizerConfig(
            peak_lr=1e-5,
            end_lr=1e-6,
            warmup_steps=3_000,
            beta1=0.9,
            beta2=0.98,
            eps=1e-6,
            clip_norm=1.0,
        ),
        parameters=stage_3(weight_decay=0.05),
        micro_batches=16,  # one row for every two chips of 16
        loss_chunk=512,
        mesh=MeshConfig(data=1, fsdp=-1, tensor=2),
    )
