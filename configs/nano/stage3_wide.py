"""Stage 3 of the small model on wider data: dialogue, the tower frozen (paper 3.3).

Half of the samples are dialogues, in English and Chinese and about one or two pictures; the others
are those of stage 2, so that what it learned is not lost.

    configs/nano/rows.sh dialogue
    python train.py configs/nano/stage3_wide.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_3

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage3_wide",
        steps=1200,
        seed=10,
        init="runs/nano/stage2_cells",
        model=nano(num_queries=16),
        data=DataConfig(
            source="rows",
            mixture={
                f"{ROWS}/dialogue/scenes": 0.2,
                f"{ROWS}/dialogue/animals": 0.17,
                f"{ROWS}/dialogue/food": 0.13,
                f"{ROWS}/train/scenes": 0.24,
                f"{ROWS}/train/animals": 0.14,
                f"{ROWS}/train/food": 0.12,
            },
            length=256,
            max_images=5,
            image_size=112,
            rows=6,
            tokenizer="configs/nano/wide.tiktoken",
            max_bad_fraction=0.1,  # dialogues with many boxes are longer than a row
        ),
        optimizer=OptimizerConfig(peak_lr=4e-4, end_lr=1e-5, warmup_steps=50),
        parameters=stage_3(),
    )
