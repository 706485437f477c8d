"""Stage 2 of the small model on wider data: objects, pages and Chinese beside the drawn scenes.

It begins from the weights of `stage3_again` under the larger vocabulary, which Makefile's `nano`
makes, and everything is trained. A third of the samples are drawn scenes, so that those stay. What
ships was ended at step 5,722 by hand, to go on with `stage2_cells` (docs/nano.md).

    configs/nano/rows.sh train
    python train.py configs/nano/stage2_wide.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2

ROWS = "runs/nano/rows/train"


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2_wide",
        steps=9200,
        seed=9,
        init="runs/nano/wide_start",
        model=nano(num_queries=16),
        data=DataConfig(
            source="rows",
            mixture={
                f"{ROWS}/scenes": 0.36,
                f"{ROWS}/animals": 0.26,
                f"{ROWS}/food": 0.2,
                f"{ROWS}/english": 0.11,
                f"{ROWS}/chinese": 0.07,
            },
            length=256,
            max_images=5,
            image_size=112,
            rows=6,
            tokenizer="configs/nano/wide.tiktoken",
            max_bad_fraction=0.05,  # dialogues with many boxes are longer than a row
        ),
        optimizer=OptimizerConfig(peak_lr=8e-4, end_lr=1e-5, warmup_steps=100),
        parameters=stage_2(tower_decay=1.0),
    )
