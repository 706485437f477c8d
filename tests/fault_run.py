"""The run that the fault table is made with: a model of 60,000 parameters on drawn scenes.

Its tower is frozen, so that it has both kinds of weights: those of each save, and those of the run.

python train.py tests/fault_run.py --simulate-fault kill@5
"""

import dataclasses

import tiny

from qwenvl_jax.config import CheckpointConfig, DataConfig, MeshConfig, TrainConfig
from qwenvl_jax.presets import stage_3

STEPS = 8
SAVED_EVERY = 2


def get_config() -> TrainConfig:
    model = tiny.model_config()
    decoder = dataclasses.replace(model.decoder, vocab_size=739, max_positions=256)
    model = dataclasses.replace(model, decoder=decoder, image_size=56, image_start_id=736)
    data = DataConfig(
        source="scenes",
        tasks={"caption": 1.0},
        length=96,
        max_images=2,
        image_size=56,
        rows=8,
        tokenizer="configs/nano/scenes.tiktoken",
    )
    return tiny.train_config(
        run_dir="build/fault_run",
        steps=STEPS,
        model=model,
        data=data,
        parameters=stage_3(),
        mesh=MeshConfig(),
        checkpoint=CheckpointConfig(every_steps=SAVED_EVERY, keep=3),
    )
