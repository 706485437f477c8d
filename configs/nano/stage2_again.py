"""Stage 2 of the small model once more, after dialogue: mostly places.

Places are what the small model learns last (docs/decisions.md), and the loss on them was still
falling when stage 3 began. Everything is trained, and half of the samples now hold a box.

    python train.py configs/nano/stage2_again.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2_again",
        steps=11000,
        seed=7,
        init="runs/nano/stage3",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={
                "chat": 3.5,
                "caption": 0.5,
                "vqa": 4.5,
                "ocr_vqa": 1.25,
                "grounded_caption": 4.0,
                "ref_grounding": 4.0,
                "grounded_captioning": 0.75,
                "ocr": 0.5,
                "map": 1.0,
                "letters": 1.25,
            },
            length=160,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=6e-4, end_lr=1e-5, warmup_steps=100),
        parameters=stage_2(tower_decay=1.0),
    )
