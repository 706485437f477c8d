"""Fine-tunes the model that comes with the package on a conversation file: to try it on a laptop.

    python train.py configs/nano/finetune.py --data.path=my.json
    qwenvl chat --model runs/nano/finetune

`my.json` has the format of the original `finetune.py` (docs/data.md). The model knows little of the
world: from a file it learns how to answer, and the file's own pictures. The same command with
`configs/finetune.py` trains the released weights.

Cost: 3 minutes, 0.55 s a step, on two cores.
Expect: on the six dialogues of tests/data/conversations/shelf.json the loss falls from 4.3 to 0.007
at step 50: the model knows them by heart. Fewer steps keep more of what it knew before.
"""

from qwenvl_jax.cli.opening import SHIPPED_MODEL
from qwenvl_jax.config import DataConfig, OptimizerConfig, TrainConfig
from qwenvl_jax.presets import nano, released_finetune


def get_config() -> TrainConfig:
    return TrainConfig(
        run_dir="runs/nano/finetune",
        steps=300,
        seed=0,
        init=str(SHIPPED_MODEL),
        model=nano(),
        data=DataConfig(
            source="rows",
            path="my.json",
            mask="released",
            cut_turns=True,
            length=512,
            max_images=7,
            image_size=112,
            rows=4,
            tokenizer="",  # that of `init`
        ),
        optimizer=OptimizerConfig(peak_lr=3e-4, end_lr=0.0, warmup_steps=10, beta2=0.95),
        parameters=released_finetune(weight_decay=0.1),
    )
