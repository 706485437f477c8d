"""Stage 2 of the small model, on from `stage2_counted`: a query for each patch of a picture.

With 36 queries for 64 patches, numbers and boxes are wrong where many things lie in a collage. Here
a picture has 64, which begin between those that were learned. Numbers are a fifth of the rows.

    configs/nano/rows.sh counted
    configs/nano/rows.sh whole
    configs/nano/rows.sh whole_pairs
    python convert.py import runs/nano/stage2_counted runs/nano/counted
    python convert.py queries runs/nano/counted 64 runs/nano/patches_start
    python train.py configs/nano/stage2_patches.py --model.dtype float32
"""

import dataclasses
from pathlib import Path

from qwenvl_jax.cli.config_file import load_config
from qwenvl_jax.config import TrainConfig

ROWS = "runs/nano/rows"


def get_config() -> TrainConfig:
    base = load_config(Path(__file__).with_name("stage2_counted.py"))
    adapter = dataclasses.replace(base.model.adapter, num_queries=64)
    mixture = {
        f"{ROWS}/counted/animals": 0.12,
        f"{ROWS}/counted/food": 0.06,
        f"{ROWS}/whole/scenes": 0.08,
        f"{ROWS}/whole/animals": 0.26,
        f"{ROWS}/whole/food": 0.15,
        f"{ROWS}/whole/english": 0.11,
        f"{ROWS}/whole/chinese": 0.12,
        f"{ROWS}/whole_pairs/animals": 0.055,
        f"{ROWS}/whole_pairs/food": 0.045,
    }
    return dataclasses.replace(
        base,
        run_dir="runs/nano/stage2_patches",
        steps=4600,
        seed=34,
        init="runs/nano/patches_start",
        model=dataclasses.replace(base.model, adapter=adapter),
        optimizer=dataclasses.replace(base.optimizer, peak_lr=6e-4, warmup_steps=100),
        data=dataclasses.replace(base.data, mixture=mixture, length=384, rows=6, max_images=5),
    )
