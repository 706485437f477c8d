"""Time and memory of converting a checkpoint of the real size, both ways.

Writes a synthetic Qwen-VL of 9.66 B parameters (random finite bf16 bits, 10 safetensors shards)
into a scratch folder, imports it, exports the result, and compares every exported tensor with the
original, bit for bit. Then the same with a LoRA adapter of PEFT as the original `finetune.py` makes
it, whose pairs are in what comes back. Each conversion is a process of its own whose anonymous
memory is sampled. It needs 60 GB of disk; what it wrote is removed at the end.

    python benchmarks/convert_full_size.py --scratch build/convert
"""

import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import tyro
from open_conversations import peak_bytes

from qwenvl_jax.config import ModelConfig
from qwenvl_jax.conversion.config import released_config
from qwenvl_jax.conversion.placement import in_released_order
from qwenvl_jax.conversion.reader import ReleasedFolder
from qwenvl_jax.conversion.rules import qwen_vl_rules
from qwenvl_jax.conversion.safetensors_file import write_safetensors
from qwenvl_jax.presets import qwen_vl

DOOR = str(Path(__file__).resolve().parents[1] / "convert.py")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
POOL_ELEMENTS = 1 << 25  # random bits are drawn once and used from another place each time


Draw = Callable[[str, tuple[int, ...]], np.ndarray]  # name, shape -> bfloat16
Pair = tuple[np.ndarray, np.ndarray]  # a LoRA pair: down, up
RANK, ALPHA = 64, 16
ADAPTED = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")  # of every decoder layer


def any_bits() -> Draw:
    """Returns what draws finite bits of every kind: no model, but nothing is equal by chance."""
    pool = np.random.default_rng(0).integers(0, 1 << 16, POOL_ELEMENTS, np.uint16)
    pool &= 0xBFFF  # without the exponent's top bit no pattern is infinite or NaN
    return lambda name, shape: from_pool(pool, name, shape).view(BFLOAT16)


def from_pool(pool: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns an array of numbers from the pool, from a place that follows from the name."""
    return np.resize(np.roll(pool, -(zlib.crc32(name.encode()) % len(pool))), shape)


def make_checkpoint(folder: Path, config: ModelConfig, num_shards: int, draw: Draw) -> int:
    """Writes a synthetic released folder and returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    shapes = {
        name: (BFLOAT16, rule.shape) for name, rule, _ in in_released_order(qwen_vl_rules(config))
    }
    total = sum(2 * int(np.prod(shape)) for _, shape in shapes.values())
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (_, shape) in shapes.items():
        if filled > total / num_shards * len(shards):
            shards.append([])
        shards[-1].append(name)
        filled += 2 * int(np.prod(shape))
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = (draw(name, shapes[name][1]) for name in names)
        write_safetensors(folder / file, {name: shapes[name] for name in names}, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(released_config(config, "bfloat16")))
    print(f"made {len(shapes)} tensors, {total:,} bytes, {len(shards)} shards", flush=True)
    return total


def run_measured(name: str, *command: str) -> None:
    """Runs a Python program in a process of its own; prints its times and peak anonymous memory."""
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, *command])
    peak = peak_bytes(process)
    if process.returncode:
        sys.exit(f"{name} ended with exit code {process.returncode}")
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{name}: {seconds:.0f} s, {cpu:.0f} s of CPU time, "
        f"peak anonymous memory {peak / 1e9:.2f} GB",
        flush=True,
    )


def make_adapter(folder: Path, config: ModelConfig) -> dict[str, Pair]:
    """Writes a PEFT adapter of small random pairs and returns them by the matrix they belong to."""
    folder.mkdir()
    draw, pairs, tensors = np.random.default_rng(1), {}, {}
    rules = {name: rule for name, rule, _ in in_released_order(qwen_vl_rules(config))}
    for name, rule in rules.items():
        module = name.removesuffix(".weight")
        if name.startswith("transformer.h.") and module.endswith(ADAPTED):
            outputs, inputs = rule.shape
            down = draw.standard_normal((RANK, inputs), np.float32)
            up = draw.standard_normal((outputs, RANK), np.float32) / 100
            pairs[name] = (down, up)
            for letter, half in zip("AB", pairs[name], strict=True):
                tensors[f"base_model.model.{module}.lora_{letter}.weight"] = half
    file = folder / "adapter_model.safetensors"
    write_safetensors(file, {n: (x.dtype, x.shape) for n, x in tensors.items()}, tensors.values())
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    print(f"made an adapter of {len(pairs)} pairs", flush=True)
    return pairs


def count_differences(one: Path, other: Path, pairs: Mapping[str, Pair] = {}) -> int:
    """Returns how many tensors of two released folders are not equal bit for bit.

    Where there is a pair it is added to the first one's, and one rounding may be another.
    """
    with ReleasedFolder(one) as a, ReleasedFolder(other) as b:
        differing = set(a.slots) ^ set(b.slots)
        for name in set(a.slots) & set(b.slots):
            pair, left, right = pairs.get(name), a.tensor(name), b.tensor(name)
            if not (is_same(left, right) if pair is None else is_sum(left, pair, right)):
                differing.add(name)
        print(
            f"compared {len(a.slots)} tensors, {len(pairs)} of them with pairs: "
            f"{len(differing)} differ",
            flush=True,
        )
        return len(differing)


def is_sum(base: np.ndarray, pair: Pair, found: np.ndarray) -> bool:
    """Returns whether `found` is base and pair together, in bfloat16, and not the base alone."""
    down, up = pair
    expected = base.astype(np.float32) + np.float32(ALPHA / RANK) * (up @ down)
    found = found.astype(np.float32)
    is_near = np.abs(found - expected) <= 2.0**-7 * np.abs(expected) + 1e-6
    return bool(is_near.all()) and not np.array_equal(found, base.astype(np.float32))


def is_same(left: np.ndarray, right: np.ndarray) -> bool:
    """Returns whether two tensors have the same dtype, shape and bits, 4096 rows at a time."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    left, right = left.view(np.uint16), right.view(np.uint16)
    starts = range(0, len(left), 4096)
    return all(np.array_equal(left[i : i + 4096], right[i : i + 4096]) for i in starts)


@dataclasses.dataclass
class Options:
    scratch: Path = Path("build/convert")  # a new folder, removed at the end
    num_shards: int = 10


def main(options: Options) -> int:
    scratch = options.scratch
    scratch.mkdir(parents=True)
    try:
        make_checkpoint(scratch / "released", qwen_vl(), options.num_shards, any_bits())
        released, ours, again = (str(scratch / name) for name in ("released", "ours", "again"))
        run_measured("import", DOOR, "import", released, ours)
        run_measured("export", DOOR, "export", ours, again)
        differing = count_differences(scratch / "released", scratch / "again")
        for folder in (ours, again):  # there is no disk for more copies
            shutil.rmtree(folder)
        pairs = make_adapter(scratch / "adapter", qwen_vl())
        adapter = ["--lora", str(scratch / "adapter")]
        run_measured("import with an adapter", DOOR, "import", released, ours, *adapter)
        run_measured("export", DOOR, "export", ours, again)
        differing += count_differences(scratch / "released", scratch / "again", pairs)
        return int(differing > 0)
    finally:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
