"""Stage 1 of the small model: pictures and captions, the decoder frozen (paper 3.1).

The tower and the adapter learn to say what is in a picture in a form that the decoder of stage 0
already understands. Half of the captions name the place of each thing: with a few thousand pictures
to learn from, where a thing is must be told, not guessed.

    python train.py configs/nano/stage1.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_1


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage1",
        steps=250,
        seed=1,
        init="runs/nano/stage0_tell",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={"caption": 1.0, "grounded_caption": 1.0},
            length=128,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=6e-4, end_lr=3e-4, warmup_steps=50),
        parameters=stage_1(tower_decay=1.0),
    )
