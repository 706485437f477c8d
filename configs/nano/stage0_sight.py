"""Stage 0 of the small model, second part: the tower learns to see, before it has to tell.

It stands where OpenCLIP stands in the paper: a tower that has seen pictures. The samples name shape
and colour of each cell of the picture, one cell an adapter query, so every patch hears at once what
it should have seen. From captions alone shapes were not learnt (docs/decisions.md).

    python train.py configs/nano/stage0_sight.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage0_sight",
        steps=1000,
        seed=4,
        init="runs/nano/stage0",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={"map": 3.0, "grounded_captioning": 1.0, "text": 0.5},
            length=136,
            max_images=2,
            image_size=112,
            rows=10,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=3e-4, warmup_steps=100),
        parameters=stage_2(tower_decay=1.0),
    )
