"""Stage 2 of the small model: everything trained on the seven tasks and text (paper 3.2).

Captions, questions, phrases and their boxes both ways, and written words with their quads, packed
into rows.

    python train.py configs/nano/stage2.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2",
        steps=3400,
        seed=2,
        init="runs/nano/stage1",
        model=nano(),
        data=DataConfig(
            source="scenes",
            tasks={
                "caption": 1.0,
                "vqa": 3.5,
                "ocr_vqa": 0.5,
                "grounded_caption": 3.0,  # the densest: everything in the picture, with its place
                "ref_grounding": 2.5,
                "grounded_captioning": 1.0,
                "ocr": 1.5,
                "text": 0.25,
            },
            length=128,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="qwenvl_jax/assets/nano",
        ),
        optimizer=OptimizerConfig(peak_lr=5e-4, end_lr=1e-5, warmup_steps=100),
        freeze=(),
    )
