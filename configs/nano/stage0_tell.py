"""Stage 0 of the small model, third part: the decoder learns to tell what the tower sees.

Stage 1 freezes the decoder, so before it the decoder must have met pictures: the released one is
large enough to follow whatever the adapter sends, a small one has to agree with it once. Lists of
letters join the lists of shapes and colours, and captions and questions come back.

    python train.py configs/nano/stage0_tell.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage0_tell",
        steps=700,
        seed=5,
        init="runs/nano/stage0_sight",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={
                "map": 2.0,
                "letters": 2.0,
                "caption": 1.0,
                "grounded_caption": 1.5,
                "vqa": 2.0,
                "ref_grounding": 1.0,
                "text": 0.25,
            },
            length=128,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3, end_lr=6e-4, warmup_steps=50),
        parameters=stage_2(tower_decay=1.0),
    )
