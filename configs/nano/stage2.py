"""Stage 2 of the small model: everything trained on the seven tasks and text (paper 3.2).

Captions, questions, phrases and their boxes both ways, and written words with their quads, packed
into rows. Lists of what lies in each cell stay in the mixture, now of letters too: they are the
shortest way from the loss to the tower.

    python train.py configs/nano/stage2.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, stage_2


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage2",
        steps=4800,
        seed=2,
        init="runs/nano/stage1",
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="scenes",
            tasks={
                "caption": 1.0,
                "vqa": 4.0,
                "ocr_vqa": 1.5,
                "grounded_caption": 2.5,  # the densest: everything in the picture, with its place
                "ref_grounding": 2.5,
                "grounded_captioning": 1.0,
                "ocr": 0.75,
                "text": 0.25,
                "map": 2.5,  # what stage 0 taught the tower, and the same for letters
                "letters": 2.5,
            },
            length=128,
            max_images=3,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=8e-4, end_lr=1e-5, warmup_steps=100),
        parameters=stage_2(tower_decay=1.0),
    )
