"""The conversions: released folders, starting points and runs to our folder, and ours to released.

    released files -> reader -> rules, transforms -> slices -> weights folder        import
    weights folder -> slices -> rules, transforms -> safetensors shards              export

Each looks at everything before it writes anything, holds one slice at a time, and builds its result
in a folder beside the wanted one, which takes its name only when it is complete.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx

from qwenvl_jax.checkpoint.leaves import DTYPES, Leaf, OnBytes, unwatched
from qwenvl_jax.checkpoint.weights import (
    TOKENIZER,
    WeightsError,
    check_new,
    check_space,
    copy_tokenizer,
    is_weights_folder,
    new_folder,
    open_weights,
    read_weights_config,
    save_weights,
    verify_weights,
    write_weights,
)
from qwenvl_jax.config import ModelConfig
from qwenvl_jax.conversion.config import (
    model_config_from_parts,
    model_config_from_released,
    released_config,
)
from qwenvl_jax.conversion.load import load_run, read_config
from qwenvl_jax.conversion.peft import AdaptedFolder
from qwenvl_jax.conversion.placement import (
    check_released,
    in_released_order,
    released_dtype,
    released_leaves,
    released_tensor,
)
from qwenvl_jax.conversion.reader import ReleasedFolder, read_json
from qwenvl_jax.conversion.released_code import ReleasedCode
from qwenvl_jax.conversion.rules import (
    OPENCLIP_IGNORED,
    Rule,
    decoder_rules,
    openclip_rules,
    qwen_vl_rules,
)
from qwenvl_jax.conversion.safetensors_file import write_safetensors
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.sharding import make_mesh, named_arrays

# (what is being done, bytes of all of it) -> a context that gives the callback
Watch = Callable[[str, int], AbstractContextManager[OnBytes]]
ExportDType = Literal["keep", "bfloat16", "float32"]
SHARD_BYTES = 2_000_000_000
OPENCLIP_CONFIG = "open_clip_config.json"


def no_watch(stage: str, num_bytes: int) -> AbstractContextManager[OnBytes]:
    """Returns the context of those who do not watch."""
    del stage, num_bytes
    return nullcontext(unwatched)


def import_released(
    source: str | Path,
    target: str | Path,
    watch: Watch = no_watch,
    *,
    lora: str | Path | None = None,
) -> ModelConfig:
    """Writes our folder from a released Qwen-VL one; every array keeps its bits and its dtype.

    `lora` is the folder of a PEFT adapter that was trained on the model: its pairs are added.

    Raises:
        ConversionError: naming everything that is wrong with the source; nothing is written.
    """
    source = Path(source)
    if is_weights_folder(source):
        way_out = (
            "load it as it is"
            if lora is None
            else "an adapter is added to a released folder: export it"
        )
        raise ConversionError(source, [f"is a folder of ours already: {way_out}"])
    config = model_config_from_released(read_json(source / "config.json"), source / "config.json")
    rules = qwen_vl_rules(config)
    opened = ReleasedFolder(source) if lora is None else AdaptedFolder(source, lora)
    with new_folder(target) as folder, opened as released:
        size = _num_bytes(released, rules)
        check_space(folder, size)  # before minutes of reading
        with watch("check", size) as on_bytes:
            check_released(released, rules, on_bytes=on_bytes)
        with watch("import", size) as on_bytes:
            write_weights(folder, config, released_leaves(released, rules), on_bytes)
        copy_tokenizer(source, folder)
    return config


def import_run(source: str | Path, target: str | Path) -> ModelConfig:
    """Writes our folder from a training run's newest good checkpoint, in the run's dtypes.

    Unlike the others, this holds the whole model in memory.

    Raises:
        CheckpointError: the run has no checkpoint that is whole.
    """
    source = Path(source)
    check_new(target)  # before a whole model is read
    config = read_config(source)
    state = load_run(source, abstract_state(config, make_mesh())[1])
    vocabulary = source / TOKENIZER
    save_weights(target, config, state, vocabulary if vocabulary.is_file() else None)
    return config


def import_parts(
    vit: str | Path,
    llm: str | Path,
    target: str | Path,
    *,
    image_start_id: int,
    num_queries: int = 256,
    seed: int = 0,
    watch: Watch = no_watch,
) -> ModelConfig:
    """Writes our folder from an OpenCLIP tower and a Qwen-7B, with a new adapter between them.

    This is where stage 1 starts (paper 3). `image_start_id` is the tokenizer's id of `<img>`;
    the adapter is drawn from `seed`, in float32.

    Raises:
        ConversionError: naming everything that is wrong with one of the sources.
    """
    vit, llm = Path(vit), Path(llm)
    config = model_config_from_parts(
        read_json(vit / OPENCLIP_CONFIG),
        read_json(llm / "config.json"),
        image_start_id=image_start_id,
        num_queries=num_queries,
    )
    tower_rules, text_rules = openclip_rules(config.vision), decoder_rules(config.decoder)
    with new_folder(target) as folder, ReleasedFolder(vit) as tower, ReleasedFolder(llm) as text:
        with watch("check tower", _num_bytes(tower, tower_rules)) as on_bytes:
            check_released(tower, tower_rules, OPENCLIP_IGNORED, on_bytes=on_bytes)
        with watch("check decoder", _num_bytes(text, text_rules)) as on_bytes:
            check_released(text, text_rules, on_bytes=on_bytes)
        leaves = released_leaves(tower, tower_rules) | released_leaves(text, text_rules)
        leaves |= _new_adapter(config, seed)
        total = sum(leaf.num_bytes for leaf in leaves.values())
        with watch("import", total) as on_bytes:
            write_weights(folder, config, leaves, on_bytes)
        copy_tokenizer(llm, folder)
    return config


def export_released(
    source: str | Path,
    target: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: ExportDType = "keep",
    like: str | Path | None = None,
    watch: Watch = no_watch,
) -> int:
    """Writes a released folder (safetensors, `config.json`) from ours; returns its shard count.

    `dtype="keep"` gives back the bits that were imported; the others round to nearest. `like` is a
    released folder whose code and settings are copied, which `from_pretrained` needs.

    Raises:
        WeightsError: the source is not a folder of ours, or is damaged.
        ConversionError: the released format has no place for a model of these sizes, or `like` has
            no code.
    """
    source, code = Path(source), None if like is None else ReleasedCode(like)
    if not is_weights_folder(source):
        raise WeightsError(
            f"{source} is not a folder of ours: it has no weights.json; a run or a released folder "
            "is imported first: python convert.py import SRC DST"
        )
    config, leaves = read_weights_config(source), open_weights(source)
    rules = qwen_vl_rules(config)
    _check_leaves(source, rules, leaves)
    kinds = {leaf.dtype.name for leaf in leaves.values()} if dtype == "keep" else {dtype}
    torch_dtype = kinds.pop() if len(kinds) == 1 else _most_common_dtype(leaves)
    described = released_config(config, torch_dtype)  # may refuse: before any reading
    if code is not None:
        described = code.add_to(described)
    total = sum(leaf.num_bytes for leaf in leaves.values())
    shards = _plan_shards(rules, leaves, shard_bytes, dtype)
    with new_folder(target) as folder:
        check_space(folder, sum(entry.num_bytes for shard in shards for entry in shard.values()))
        with watch("check", total) as on_bytes:
            verify_weights(source, on_bytes)
        with watch("export", total) as on_bytes:
            _write_shards(folder, shards, leaves, on_bytes)
        text = json.dumps(described, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        copy_tokenizer(source, folder)
        if code is not None:
            code.copy_to(folder)
    return len(shards)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A tensor to be written: what it is made of, and how it is stored."""

    rule: Rule
    layer: int
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.rule.shape, dtype=np.int64)) * self.dtype.itemsize


def _plan_shards(
    rules: tuple[Rule, ...], leaves: dict[str, Leaf], shard_bytes: int, dtype: ExportDType
) -> list[dict[str, _Entry]]:
    """Returns name -> entry for each file; a tensor larger than `shard_bytes` has its own."""
    shards: list[dict[str, _Entry]] = []
    filled = 0
    for name, rule, layer in in_released_order(rules):
        kept = released_dtype(rule, leaves)
        entry = _Entry(rule, layer, kept if dtype == "keep" else DTYPES[dtype])
        if not shards or filled + entry.num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += entry.num_bytes
    return shards


def _write_shards(
    folder: Path, shards: list[dict[str, _Entry]], leaves: dict[str, Leaf], on_bytes: OnBytes
) -> None:
    def tensors(shard: dict[str, _Entry]) -> Iterator[np.ndarray]:
        for entry in shard.values():
            tensor = released_tensor(entry.rule, entry.layer, leaves)
            on_bytes(tensor.nbytes)
            yield tensor if tensor.dtype == entry.dtype else tensor.astype(entry.dtype)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = file if len(shards) > 1 else "model.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        shapes = {name: (entry.dtype, entry.rule.shape) for name, entry in shard.items()}
        write_safetensors(folder / file, shapes, tensors(shard))
    if len(shards) > 1:
        total = sum(entry.num_bytes for shard in shards for entry in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _check_leaves(source: Path, rules: tuple[Rule, ...], leaves: dict[str, Leaf]) -> None:
    expected = {
        path: shape
        for rule in rules
        for path, shape in zip(rule.ours, rule.our_shapes(), strict=True)
    }
    problems = [f"{path} is missing" for path in expected if path not in leaves]
    for path, leaf in leaves.items():
        if path not in expected:
            problems.append(f"{path} is unknown")
        elif leaf.shape != expected[path]:
            problems.append(f"{path} is misshapen: got {leaf.shape}, expected {expected[path]}")
    if problems:
        raise ConversionError(source, problems)


def _new_adapter(config: ModelConfig, seed: int) -> dict[str, Leaf]:
    adapter = Adapter(
        config.adapter,
        config.vision.width,
        config.decoder.width,
        "float32",
        rngs=nnx.Rngs(params=jax.random.key(seed)),
    )
    leaves = {}
    for path, drawn in named_arrays(nnx.state(adapter)).items():
        array = np.asarray(drawn)
        leaves[f"adapter.{path}"] = Leaf(array.shape, array.dtype, array.__getitem__)
    return leaves


def _most_common_dtype(leaves: dict[str, Leaf]) -> str:
    sizes: dict[str, int] = {}
    for leaf in leaves.values():
        sizes[leaf.dtype.name] = sizes.get(leaf.dtype.name, 0) + leaf.num_bytes
    return max(sizes, key=lambda name: sizes[name])


def _num_bytes(folder: ReleasedFolder, rules: tuple[Rule, ...]) -> int:
    names = {name for rule in rules for name in rule.names()}
    return sum(slot.num_bytes for name, slot in folder.slots.items() if name in names)
