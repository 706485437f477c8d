"""Stage 1 of the paper: image-text pairs at 224 pixels, the language model frozen (Table 8).

    python convert.py import --vit OPENCLIP_BIGG --llm QWEN_7B weights/start
    python train.py configs/stage1_pretrain.py

Cost: about 1.5 billion pairs, 1.8e22 FLOP with the frozen decoder's forward pass and input gradient
counted; at half of the peak rate 10,000 H100 hours or 52,000 v5e chip-hours (a calculation).
Disk, computed: 23 GB a checkpoint, 12 bytes a trained parameter; three are kept, for a moment
four: 93 GB, and 31 GB of frozen weights once.
Expect: with the paper's pairs, a loss from about 3.0 to 1.8 (read off its Figure 6). The drawn
captions that this config reads give other losses. Tower and adapter are trained, 1.9 of 9.7 billion
parameters.

The paper's 1.4 billion pairs are not published whole. With pairs of your own (docs/web_data.md):

    qwenvl data prepare laion/ prepared/laion --rules web --tokenizer weights/start
    python train.py configs/stage1_pretrain.py --data.source=rows --data.path=prepared/laion
"""

import dataclasses

from qwenvl_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import qwen_vl, stage_1


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/stage1",
        steps=50_000,
        seed=0,
        init="weights/start",
        model=dataclasses.replace(
            qwen_vl(),
            image_size=224,
            dtype="bfloat16",
            attention_backend="auto",
            remat="dots",
        ),
        data=DataConfig(
            source="scenes",
            tasks={"caption": 1.0},
            length=512,
            max_images=1,  # two pictures take 516 tokens
            image_size=224,
            rows=30_720,
            tokenizer="weights/start",
        ),
        optimizer=OptimizerConfig(
            peak_lr=2e-4,
            end_lr=1e-6,
            warmup_steps=500,
            beta1=0.9,
            beta2=0.98,
            eps=1e-6,
            clip_norm=1.0,
        ),
        parameters=stage_1(tower_decay=0.95, weight_decay=0.05),
        micro_batches=20,  # 6 rows a chip on 256 chips; fewer where there is more memory
        loss_chunk=512,
        mesh=MeshConfig(data=-1, fsdp=128, tensor=1),  # widths divide by 128, not by 256
    )
