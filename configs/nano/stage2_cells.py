"""Stage 2 of the small model on wider data, second part: what lies in each cell of a collage.

After 120,000 pictures with captions, questions and places it still took stars for hearts and every
animal for a shape. Lists of what lies in each cell, which taught the tower on drawn scenes, are a
quarter of the samples here. Pages are left out: it had not begun to read them (docs/nano.md).

    configs/nano/rows.sh cells
    python train.py configs/nano/stage2_cells.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2_cells",
        steps=4800,
        seed=11,
        init="runs/nano/stage2_wide",
        model=nano(num_queries=16),
        data=DataConfig(
            source="rows",
            mixture={
                f"{ROWS}/train/scenes": 0.28,
                f"{ROWS}/train/animals": 0.24,
                f"{ROWS}/train/food": 0.2,
                f"{ROWS}/cells/animals": 0.15,
                f"{ROWS}/cells/food": 0.13,
            },
            length=256,
            max_images=5,
            image_size=112,
            rows=6,
            tokenizer="configs/nano/wide.tiktoken",
            max_bad_fraction=0.05,  # dialogues with many boxes are longer than a row
        ),
        optimizer=OptimizerConfig(peak_lr=7e-4, end_lr=1e-5, warmup_steps=100),
        parameters=stage_2(tower_decay=1.0),
    )
