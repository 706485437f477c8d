"""Stage 2 of the small model, second part: longer, with dialogue among the tasks.

The loss of the first part was still falling, and a short stage 3 had to learn ChatML and the
questions at once. The rate starts lower, so that what is there stays.

    python train.py configs/nano/stage2_longer.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2_longer",
        steps=2000,
        seed=6,
        init="runs/nano/stage2",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={
                "chat": 2.0,
                "caption": 0.75,
                "vqa": 6.0,
                "ocr_vqa": 1.5,
                "grounded_caption": 2.0,
                "ref_grounding": 2.5,
                "grounded_captioning": 0.5,
                "ocr": 0.5,
                "map": 2.0,
                "letters": 2.5,
            },
            length=160,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=6e-4, end_lr=1e-5, warmup_steps=50),
        parameters=stage_2(tower_decay=1.0),
    )
