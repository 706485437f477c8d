"""Stage 3 of the small model: dialogue in ChatML, the tower frozen (paper 3.3).

The other tasks stay in the mixture, so that what stage 2 learned is not lost.

    python train.py configs/nano/stage3.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_3


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage3",
        steps=950,
        seed=3,
        init="runs/nano/stage2_longer",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={
                "chat": 5.0,
                "vqa": 4.0,
                "ref_grounding": 2.0,
                "grounded_caption": 0.5,
                "caption": 0.5,
                "ocr": 0.5,
            },
            length=160,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=5e-4, end_lr=1e-5, warmup_steps=50),
        parameters=stage_3(),
    )
