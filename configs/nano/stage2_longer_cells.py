"""Stage 2 of the small model on wider data, third part: dialogues too, and longer.

The loss of `stage2_cells` was still falling. It begins from what stage 3 left, with everything
trained, and ends at a low rate.

    python train.py configs/nano/stage2_longer_cells.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2_longer_cells",
        steps=2000,
        seed=12,
        init="runs/nano/stage3_wide",
        model=nano(num_queries=16),
        data=DataConfig(
            source="rows",
            mixture={
                f"{ROWS}/train/scenes": 0.26,
                f"{ROWS}/train/animals": 0.22,
                f"{ROWS}/train/food": 0.18,
                f"{ROWS}/cells/animals": 0.1,
                f"{ROWS}/cells/food": 0.08,
                f"{ROWS}/dialogue/scenes": 0.06,
                f"{ROWS}/dialogue/animals": 0.05,
                f"{ROWS}/dialogue/food": 0.05,
            },
            length=256,
            max_images=5,
            image_size=112,
            rows=6,
            tokenizer="configs/nano/wide.tiktoken",
            max_bad_fraction=0.05,  # dialogues with many boxes are longer than a row
        ),
        optimizer=OptimizerConfig(peak_lr=6e-4, end_lr=1e-5, warmup_steps=50),
        parameters=stage_2(tower_decay=1.0),
    )
