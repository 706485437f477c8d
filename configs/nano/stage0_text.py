"""Stage 0 of the small model: the decoder learns the language, before it sees anything.

It stands where Qwen-7B stands in the paper: something that can already read and write. The samples
are those of the later stages with a written inventory of the scene in place of the picture, so the
decoder learns to look answers up in what stands before the question.

    python train.py configs/nano/stage0_text.py
"""

from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, text_only


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/stage0",
        steps=1000,
        seed=0,
        init=None,
        model=nano(num_ranks=522, num_queries=16),
        data=DataConfig(
            source="text",
            tasks={
                "caption": 2.0,
                "vqa": 4.0,
                "ocr_vqa": 1.0,
                "grounded_caption": 1.0,
                "ref_grounding": 2.0,
                "grounded_captioning": 1.0,
                "ocr": 1.0,
                "text": 0.5,
            },
            length=256,
            max_images=0,
            image_size=112,
            rows=8,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=2e-3, end_lr=1e-4, warmup_steps=50),
        parameters=text_only(),
    )
