"""What a LoRA run has trained, as an adapter in PEFT's format for the released PyTorch model.

The inverse of `peft.py`. Queries, keys and values have a pair each in ours and one matrix W in the
released code, so W's pair has their ranks together: A is their three A stacked, and B has each of
their B in the rows and columns that are its own.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qwenvl_jax.checkpoint.store import restore_trained
from qwenvl_jax.checkpoint.weights import check_new, new_folder
from qwenvl_jax.config import LoraConfig
from qwenvl_jax.conversion.load import run_config
from qwenvl_jax.conversion.peft import CONFIG, FILES
from qwenvl_jax.conversion.reader import read_json
from qwenvl_jax.conversion.rules import Rule, qwen_vl_rules
from qwenvl_jax.conversion.safetensors_file import write_safetensors
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.model.lora import pair_of

_PREFIX = "base_model.model."
# PyTorch's attention multiplies by the weights of its modules, past what PEFT puts around them.
_UNCALLED = "transformer.visual.attn_pool.attn."
Arrays = Mapping[str, np.ndarray]


class _Part(NamedTuple):
    """What was trained of one rule: thin matrices, or the tensor itself."""

    rule: Rule
    arrays: dict[str, np.ndarray]  # ending of PEFT's name -> array, the layers first

    @property
    def rank(self) -> int:
        """The rank of its pairs, 0 where it was trained whole."""
        return self.arrays["lora_A.weight"].shape[-2] if len(self.arrays) > 1 else 0


def export_adapter(run: str | Path, target: str | Path) -> int:
    """Writes the adapter of a run's newest good checkpoint; returns how many modules it changes.

    The frozen weights are not read.

    Raises:
        CheckpointError: the run has no checkpoint that is whole.
        ConversionError: the run has no pairs, or some where PEFT has no place for them.
    """
    run = Path(run)
    check_new(target)
    config = run_config(run)
    if not config.lora.rank:
        raise ConversionError(
            run,
            [
                "was trained without LoRA: make the whole model of it, by 'convert.py import RUN "
                "WEIGHTS' and 'convert.py export WEIGHTS DST'"
            ],
        )
    base = base_of(run)
    trained = {name: np.asarray(x) for name, x in restore_trained(run).items()}
    parts, problems = [], []
    left = set(trained)
    for rule in qwen_vl_rules(config):
        names = {name for path in rule.ours for name in (path, *pair_of(path)) if name in trained}
        left -= names
        if not names:
            continue
        module = rule.released.removesuffix(".weight")
        if module.startswith(_UNCALLED):
            problems.append(
                f"{module} is read by torch.nn.MultiheadAttention, not called: a pair has no effect"
            )
        elif module == rule.released or len(rule.shape) != 2:
            problems.append(f"{rule.released} is no matrix of a module that PEFT can change")
        elif names & set(rule.ours) and not set(rule.ours) <= names:
            problems.append(f"{rule.released}: only a part of it was trained whole")
        else:
            parts.append(_part(rule, trained))
    problems += [f"{name} has no place in the released model" for name in sorted(left)]
    if problems:
        raise ConversionError(run, [f"adapter: {problem}" for problem in problems])
    with new_folder(target) as folder:
        _write(folder, parts)
        settings = _settings(parts, config.lora, base)
        (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return sum(len(part.rule.names()) for part in parts)


def base_of(run: Path) -> str | None:
    """Returns what a run's frozen weights came from: later starts may have named another `init`."""
    file = run / "manifest.json"
    try:
        return read_json(file)["starts"][0]["config"]["init"]
    except (LookupError, TypeError) as error:
        raise ConversionError(file, ["does not say what the run began with"]) from error


def _part(rule: Rule, trained: Arrays) -> _Part:
    """Returns a rule's arrays, in float32, with an axis of layers in front."""

    def layers(name: str) -> np.ndarray:
        array = np.asarray(trained[name], np.float32)
        return array if rule.num_layers is not None else array[None]

    if rule.ours[0] in trained:
        whole = zip(*(layers(path) for path in rule.ours), strict=True)
        return _Part(rule, {"weight": np.stack([rule.transform.to_released(x) for x in whole])})
    pairs = [[layers(name) for name in pair_of(path) if name in trained] for path in rule.ours]
    downs = [down.reshape(len(down), -1, down.shape[-1]) for down, _ in filter(None, pairs)]
    joined = np.concatenate(downs, axis=-1).swapaxes(-1, -2)
    ups = _apart(pairs, rule, joined.shape[1])
    both = zip(*ups, strict=True)
    up = np.stack([rule.transform.to_released(layer) for layer in both])
    # PEFT divides alpha by the rank of the whole, ours by that of one.
    up *= len(downs)
    return _Part(rule, {"lora_A.weight": joined, "lora_B.weight": up})


def _apart(pairs: list[list[np.ndarray]], rule: Rule, rank: int) -> list[np.ndarray]:
    """Returns each `up` in its rows of `rank` ones, as a kernel with so many inputs."""
    outputs = [shape[-1:] if len(rule.ours) == 1 else shape[-2:] for shape in rule.our_shapes()]
    found, row = [], 0
    for pair, shape in zip(pairs, outputs, strict=True):
        num_layers = rule.num_layers or 1
        wide = np.zeros((num_layers, rank, *shape), np.float32)
        if pair:
            up = pair[1]
            wide[:, row : row + up.shape[1]] = up
            row += up.shape[1]
        found.append(wide)
    return found


def _write(folder: Path, parts: list[_Part]) -> None:
    tensors = {
        f"{_PREFIX}{name.removesuffix('.weight')}.{ending}": array[layer]
        for part in parts
        for layer, name in enumerate(part.rule.names())
        for ending, array in part.arrays.items()
    }
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(folder / FILES[0], shapes, tensors.values())


def _settings(parts: list[_Part], lora: LoraConfig, base: Any) -> dict[str, Any]:
    """Returns `adapter_config.json`; modules by their whole names, as the tower has like ones."""
    pairs = [part for part in parts if part.rank]
    modules = [name.removesuffix(".weight") for part in pairs for name in part.rule.names()]
    whole = dict.fromkeys(
        name.rpartition(".")[0] for part in parts if not part.rank for name in part.rule.names()
    )
    ranks = {".".join(part.rule.released.split(".")[-3:-1]): part.rank for part in pairs}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "rank_pattern": {ending: rank for ending, rank in ranks.items() if rank != lora.rank},
        "target_modules": modules,
        "modules_to_save": list(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
