"""A model and a run small enough to train inside a test, and batches for it without any file."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qwenvl_jax.config import (
    NO_IMAGE,
    AdapterConfig,
    CheckpointConfig,
    DataConfig,
    DecoderConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    VisionConfig,
)
from qwenvl_jax.data.example import NO_TASK, Batch
from qwenvl_jax.presets import stage_2

IMAGE_START_ID = 50


def model_config(**changes) -> ModelConfig:
    config = ModelConfig(
        vision=VisionConfig(
            width=16, num_layers=3, num_heads=2, mlp_dim=24, patch_size=14, table_side=2
        ),
        adapter=AdapterConfig(num_queries=4, num_heads=4),
        decoder=DecoderConfig(
            width=32,
            num_layers=2,
            num_heads=4,
            head_dim=8,
            mlp_dim=40,
            vocab_size=56,
            seq_length=32,
            max_positions=64,
        ),
        image_size=28,
        image_start_id=IMAGE_START_ID,
    )
    return dataclasses.replace(config, **changes)


def train_config(run_dir: str | Path = "unused", **changes) -> TrainConfig:
    config = TrainConfig(
        run_dir=str(run_dir),
        steps=6,
        seed=7,
        init=None,
        model=model_config(),
        data=DataConfig(
            source="scenes",
            tasks={"caption": 1.0},
            length=19,
            max_images=2,
            image_size=28,
            rows=8,
            tokenizer="no such file",
        ),
        optimizer=OptimizerConfig(peak_lr=3e-3, end_lr=1e-4, warmup_steps=2),
        parameters=stage_2(tower_decay=0.9),
        loss_chunk=40,
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        checkpoint=CheckpointConfig(every_steps=2, keep=2),
        log_every=1,
    )
    return dataclasses.replace(config, **changes)


def batch(config: TrainConfig, step: int) -> Batch:
    """Returns a batch that follows from (seed, step): two samples a row, unequal scored tokens.

    The first sample of a row is of task 1, the second of task 2.
    """
    random = np.random.default_rng((config.seed, step))
    rows, length = config.data.rows, config.data.length
    slots, side = config.model.adapter.num_queries, config.data.image_size
    tokens = random.integers(0, IMAGE_START_ID, (rows, length), dtype=np.int32)
    image_start = np.full((rows, config.data.max_images), NO_IMAGE, np.int32)
    image_start[:, 0] = 2
    tokens[:, 1] = IMAGE_START_ID
    tokens[:, 2 : 2 + slots] = IMAGE_START_ID + 2
    tokens[:, 2 + slots] = IMAGE_START_ID + 1
    first = random.integers(9, 14, rows)
    column = np.arange(length)
    segment = 1 + (column >= first[:, None]) - 2 * (column >= length - 1)
    segment = np.where(column >= length - 1, 0, segment)
    position = np.where(segment == 2, column - first[:, None], column)
    targets = np.roll(tokens, -1, axis=1)
    scored = (column >= 2 + slots) & (segment > 0) & (segment == np.roll(segment, -1, axis=1))
    scored &= random.random((rows, 1)) < np.linspace(0.2, 1.0, length)
    return Batch(
        tokens=tokens,
        targets=targets.astype(np.int32),
        loss_weight=scored.astype(np.float32),
        segment=segment.astype(np.int32),
        position=position.astype(np.int32),
        images=random.integers(0, 256, (rows, config.data.max_images, side, side, 3), np.uint8),
        image_start=image_start,
        task=np.where(segment > 0, segment, NO_TASK).astype(np.int32),
    )


def batches(config: TrainConfig, first_step: int = 0) -> Iterator[Batch]:
    step = first_step
    while True:
        yield batch(config, step)
        step += 1
