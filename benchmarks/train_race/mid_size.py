"""The model of the training race, about 65 million parameters, and one batch for it."""

import numpy as np

from qwenvl_jax.config import (
    AdapterConfig,
    DataConfig,
    DecoderConfig,
    DType,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)
from qwenvl_jax.data.example import Batch
from qwenvl_jax.presets import stage_2

ROWS, LENGTH, IMAGE_SIZE = 2, 512, 224
IMAGE_START_ID = 16_000


def model_config(dtype: DType) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            width=384, num_layers=12, num_heads=6, mlp_dim=1536, patch_size=14, table_side=16
        ),
        adapter=AdapterConfig(num_queries=64, num_heads=8),
        decoder=DecoderConfig(
            width=512,
            num_layers=8,
            num_heads=8,
            head_dim=64,
            mlp_dim=1408,
            vocab_size=16_384,
            seq_length=512,
            max_positions=512,
        ),
        image_size=IMAGE_SIZE,
        image_start_id=IMAGE_START_ID,
        dtype=dtype,
        remat="dots",  # on a CPU faster than keeping everything; PyTorch keeps everything
    )


def train_config(dtype: DType, run_dir: str = "build/bench") -> TrainConfig:
    return TrainConfig(
        run_dir=run_dir,
        steps=1000,
        seed=0,
        init=None,
        model=model_config(dtype),
        data=DataConfig(
            source="scenes",
            tasks={"caption": 1.0},
            length=LENGTH,
            max_images=1,
            image_size=IMAGE_SIZE,
            rows=ROWS,
            tokenizer="configs/nano/scenes.tiktoken",
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, end_lr=1e-5, warmup_steps=10),
        parameters=stage_2(),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    )


def get_config() -> TrainConfig:
    """Returns the config under which benchmarks that take a config file measure this model."""
    return train_config("float32")


def batch() -> Batch:
    """Returns rows that are one sample each: a picture, and text up to the end."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, IMAGE_START_ID, (ROWS, LENGTH), dtype=np.int32)
    slots = 64
    tokens[:, 0], tokens[:, slots + 1] = IMAGE_START_ID, IMAGE_START_ID + 1
    tokens[:, 1 : slots + 1] = IMAGE_START_ID + 2
    scored = np.zeros((ROWS, LENGTH), np.float32)
    scored[:, slots + 2 : -1] = 1.0
    return Batch(
        tokens=tokens,
        targets=np.roll(tokens, -1, axis=1),
        loss_weight=scored,
        segment=np.ones((ROWS, LENGTH), np.int32),
        position=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
        images=random.integers(0, 256, (ROWS, 1, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8),
        image_start=np.ones((ROWS, 1), np.int32),
    )
