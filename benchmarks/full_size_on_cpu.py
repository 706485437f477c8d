"""The whole 9.66 B model on a CPU with 24 GB: answers in bfloat16, and is fine-tuned with LoRA.

Writes a synthetic Qwen-VL (normal weights, 10 safetensors shards, the published vocabulary) into a
scratch folder. Then, each in a process of its own whose anonymous memory is sampled:

  infer     loads it, encodes a picture and writes 1 and 17 tokens: seconds for each
  converted `convert.py import` makes our folder of it, which is loaded and asked in its place
  finetune  `train.py configs/finetune_lora.py` on one conversation with a picture, rows of 512
            tokens, from the released folder; two steps, a checkpoint, and one step more from there

What it says is noise, as its weights are; times, memory and files are those of the real one. It
needs 24 GB of memory and 60 GB of disk, and removes what it wrote.

    python benchmarks/full_size_on_cpu.py --scratch build/full_size
"""

import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from convert_full_size import (
    BFLOAT16,
    POOL_ELEMENTS,
    Draw,
    from_pool,
    make_checkpoint,
    run_measured,
)
from PIL import Image

from qwenvl_jax.presets import qwen_vl

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (
    "--data.length=512 --data.max-images=1 --data.rows=1 --micro-batches=1 --model.lora.rank=16 "
    "--optimizer.peak-lr=1e-3 --optimizer.warmup-steps=1 --log-every=1"
).split()


@dataclasses.dataclass(frozen=True)
class Options:
    scratch: Path = Path("build/full_size")  # a new folder, removed at the end
    parts: tuple[Literal["infer", "converted", "finetune"], ...] = (
        "infer", "converted", "finetune",
    )  # fmt: skip
    within: str = ""  # the folder that is loaded: this is the process that is watched


def normal() -> Draw:
    """Returns what draws the weights of a model that has not learned anything."""
    pool = 0.02 * np.random.default_rng(0).standard_normal(POOL_ELEMENTS, np.float32)
    pool = pool.astype(BFLOAT16).view(np.uint16)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) == 1:  # of norms, and biases
            return np.full(shape, float(name.endswith("weight")), BFLOAT16)
        return from_pool(pool, name, shape).view(BFLOAT16)

    return draw


def vocabulary() -> Path:
    """Returns the published vocabulary, which the package of the test extra carries."""
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        sys.exit("dashscope, which carries the vocabulary, is missing: install the extra `test`")
    return Path(found.origin).parent / "resources" / "qwen.tiktoken"


def make_model(folder: Path) -> None:
    """Writes the synthetic released folder, a picture, and a conversation about it."""
    make_checkpoint(folder / "model", qwen_vl(), 10, normal())
    shutil.copyfile(vocabulary(), folder / "model" / "qwen.tiktoken")
    picture = np.random.default_rng(0).integers(0, 256, (448, 448, 3), np.uint8)
    Image.fromarray(picture).save(folder / "noise.png")
    asked = f"Picture 1: <img>{folder / 'noise.png'}</img>\nWhat do you see?"
    answer = "<ref>Grey noise</ref><box>(0,0),(999,999)</box>, " + "dots beside dots " * 40
    turns = [{"from": "user", "value": asked}, {"from": "assistant", "value": answer}]
    conversations = [{"id": str(i), "conversations": turns} for i in range(8)]
    (folder / "conversations.json").write_text(json.dumps(conversations), encoding="utf-8")


def answer(folder: Path, name: str) -> None:
    """Loads the model of that name, looks at the picture and writes; prints the seconds of each."""
    from qwenvl_jax import from_pretrained

    def told(what: str, begin: float) -> None:
        print(f"  {what}: {time.perf_counter() - begin:.2f} s", flush=True)

    begin = time.perf_counter()
    vl = from_pretrained(folder / name)
    told("loading and checking every tensor", begin)
    picture = np.asarray(Image.open(folder / "noise.png"))
    for kind in ("compiling and encoding a picture", "encoding another"):
        begin = time.perf_counter()
        vl.encode_images(picture[None])
        told(kind, begin)
        picture = picture[::-1]
    tokens = vl.tokenizer.encode("What do you see? ") * 8
    for kind in ("compiling, ", ""):
        for count in (1, 17):
            begin = time.perf_counter()
            written = vl.generate(tokens, max_new_tokens=count)
            told(f"{kind}reading {len(tokens)} tokens and writing {len(written)}", begin)


def main(options: Options) -> int:
    folder = options.scratch.resolve()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if options.within:
        answer(folder, options.within)
        return 0
    folder.mkdir(parents=True)
    try:
        make_model(folder)
        if "infer" in options.parts:
            run_measured("infer", __file__, "--within", "model", "--scratch", str(folder))
        if "converted" in options.parts:
            convert = [str(ROOT / "convert.py"), "import"]
            run_measured("import", *convert, str(folder / "model"), str(folder / "ours"))
            run_measured("converted", __file__, "--within", "ours", "--scratch", str(folder))
            shutil.rmtree(folder / "ours")
        if "finetune" in options.parts:
            rows, model, run = (folder / name for name in ("conversations.json", "model", "run"))
            train = [str(ROOT / "train.py"), str(ROOT / "configs" / "finetune_lora.py"), *SETTINGS]
            train += [f"--data.path={rows}", f"--init={model}", f"--run-dir={run}"]
            run_measured("finetune, 2 steps", *train, "--steps=2")
            for part in ("frozen", "checkpoints"):
                files = [file for file in (run / part).rglob("*") if file.is_file()]
                print(f"  {part}: {sum(file.stat().st_size for file in files) / 1e9:.2f} GB")
            run_measured("and one more", *train, "--steps=3", "--allow-change", "steps")
        return 0
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
