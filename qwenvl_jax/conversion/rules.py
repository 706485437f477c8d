"""The whole correspondence between released tensor names and our parameter paths.

    V vocabulary  D text width  F text MLP  E vision width  M vision MLP  Q queries
    R pixels of one patch  K stacked layers

One row a released tensor; `{layer}` stands for every layer, and the layers of one row are stacked
along the first axis of ours. A row's shape is the released one. Nothing else in the package knows
released names.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from qwenvl_jax.config import DecoderConfig, ModelConfig, VisionConfig
from qwenvl_jax.conversion.transforms import (
    Transform,
    fused_blocks,
    fused_per_head,
    keep,
    linear,
    linear_from_heads,
    patch_convolution,
    without_class_row,
)


class Rule(NamedTuple):
    """One row: a released tensor (or one a layer), and the array or arrays of ours it holds."""

    released: str
    shape: tuple[int, ...]
    transform: Transform
    ours: tuple[str, ...]
    num_layers: int | None = None  # None: not a layer's

    def names(self) -> list[str]:
        """Returns the released names, in the order in which ours are stacked."""
        if self.num_layers is None:
            return [self.released]
        return [self.released.format(layer=layer) for layer in range(self.num_layers)]

    def our_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Returns the shapes of `ours`, stacked, without making any array."""
        shapeless = np.broadcast_to(np.zeros((), np.uint8), self.shape)
        stack = () if self.num_layers is None else (self.num_layers,)
        return tuple(stack + part.shape for part in self.transform.to_ours(shapeless))


class Ignored(NamedTuple):
    """Released names that are left out on purpose, and the reason."""

    pattern: str
    reason: str


def qwen_vl_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Returns the rows of Qwen-VL and Qwen-VL-Chat.

    Source: the names of the released checkpoint's index.
    """
    return (
        *decoder_rules(config.decoder),
        *_tower_rules(config.vision),
        *_adapter_rules(config),
    )


def decoder_rules(config: DecoderConfig) -> tuple[Rule, ...]:
    """Returns the rows of the language model; they are also all the rows of Qwen-7B."""
    V, D, F = config.vocab_size, config.width, config.mlp_dim
    N = config.num_heads
    NH = N * config.head_dim
    layer, ours = "transformer.h.{layer}.", "decoder.blocks."
    rows = (
        ("ln_1.weight", (D,), keep(), ("ln_1.scale",)),
        ("attn.c_attn.weight", (3 * NH, D), fused_blocks(N), _qkv("attn", "kernel")),
        ("attn.c_attn.bias", (3 * NH,), fused_blocks(N), _qkv("attn", "bias")),
        ("attn.c_proj.weight", (D, NH), linear_from_heads(N), ("attn.o_proj.kernel",)),
        ("ln_2.weight", (D,), keep(), ("ln_2.scale",)),
        ("mlp.w1.weight", (F, D), linear(), ("mlp.up_proj.kernel",)),
        ("mlp.w2.weight", (F, D), linear(), ("mlp.gate_proj.kernel",)),  # silu acts on w2
        ("mlp.c_proj.weight", (D, F), linear(), ("mlp.down_proj.kernel",)),
    )
    return (
        Rule("transformer.wte.weight", (V, D), keep(), ("decoder.embed.embedding",)),
        *_layered(layer, ours, config.num_layers, rows),
        Rule("transformer.ln_f.weight", (D,), keep(), ("decoder.ln_f.scale",)),
        Rule("lm_head.weight", (V, D), linear(), ("decoder.lm_head.kernel",)),
    )


def openclip_rules(config: VisionConfig) -> tuple[Rule, ...]:
    """Returns the rows of an OpenCLIP tower that stage 1 starts from. Import only.

    Its attention is PyTorch's own, [Q; K; V], where the released tower goes head by head; its
    position table has a class row in front.
    """
    E, N = config.width, config.num_heads
    attention = (
        ("attn.in_proj_weight", (3 * E, E), fused_blocks(N), _qkv("attn", "kernel")),
        ("attn.in_proj_bias", (3 * E,), fused_blocks(N), _qkv("attn", "bias")),
    )
    rows = config.table_side**2 + 1
    table = Rule(
        "visual.positional_embedding", (rows, E), without_class_row(), ("vit.position_embed",)
    )
    return (table, *_tower_parts("visual.", config, attention))


OPENCLIP_IGNORED = (
    Ignored(r"visual\.class_embedding", "the tower has no class token"),
    Ignored(r"visual\.ln_post\..*", "the adapter takes the last block's output"),
    Ignored(r"visual\.proj", "the adapter takes the last block's output"),
    Ignored(
        r"(positional_embedding|token_embedding\.weight|text_projection|logit_scale|logit_bias"
        r"|attn_mask|ln_final\..*|transformer\.resblocks\..*)",
        "the text tower has no part in Qwen-VL",
    ),
)


def _tower_rules(config: VisionConfig) -> Iterator[Rule]:
    E, N = config.width, config.num_heads
    attention = (
        ("attn.in_proj.weight", (3 * E, E), fused_per_head(N), _qkv("attn", "kernel")),
        ("attn.in_proj.bias", (3 * E,), fused_per_head(N), _qkv("attn", "bias")),
    )
    rows = config.table_side**2
    prefix = "transformer.visual."
    yield Rule(f"{prefix}positional_embedding", (rows, E), keep(), ("vit.position_embed",))
    yield from _tower_parts(prefix, config, attention)


def _tower_parts(prefix: str, config: VisionConfig, attention: tuple) -> Iterator[Rule]:
    """Yields what the released tower and OpenCLIP's have in common, around their `attention`."""
    E, M, N, side = config.width, config.mlp_dim, config.num_heads, config.patch_size
    yield Rule(
        f"{prefix}conv1.weight",
        (E, 3, side, side),
        patch_convolution(side),
        ("vit.patch_embed.kernel",),
    )
    yield from _norm(f"{prefix}ln_pre", "vit.ln_pre", E)
    rows = (
        ("ln_1.weight", (E,), keep(), ("ln_1.scale",)),
        ("ln_1.bias", (E,), keep(), ("ln_1.bias",)),
        *attention,
        ("attn.out_proj.weight", (E, E), linear_from_heads(N), ("attn.o_proj.kernel",)),
        ("attn.out_proj.bias", (E,), keep(), ("attn.o_proj.bias",)),
        ("ln_2.weight", (E,), keep(), ("ln_2.scale",)),
        ("ln_2.bias", (E,), keep(), ("ln_2.bias",)),
        ("mlp.c_fc.weight", (M, E), linear(), ("mlp.up_proj.kernel",)),
        ("mlp.c_fc.bias", (M,), keep(), ("mlp.up_proj.bias",)),
        ("mlp.c_proj.weight", (E, M), linear(), ("mlp.down_proj.kernel",)),
        ("mlp.c_proj.bias", (E,), keep(), ("mlp.down_proj.bias",)),
    )
    layer = f"{prefix}transformer.resblocks.{{layer}}."
    yield from _layered(layer, "vit.blocks.", config.num_layers, rows)


def _adapter_rules(config: ModelConfig) -> Iterator[Rule]:
    E, D = config.vision.width, config.decoder.width
    Q, N = config.adapter.num_queries, config.adapter.num_heads
    prefix = "transformer.visual.attn_pool."
    rows = (
        ("query", (Q, D), keep(), ("query",)),
        # Loaded, never made again by formula: the original fine-tuning script trains this table.
        ("pos_embed", (Q, D), keep(), ("position_embed",)),
        ("kv_proj.weight", (D, E), linear(), ("kv_proj.kernel",)),
        ("attn.in_proj_weight", (3 * D, D), fused_blocks(N), _qkv("attn", "kernel")),
        ("attn.in_proj_bias", (3 * D,), fused_blocks(N), _qkv("attn", "bias")),
        ("attn.out_proj.weight", (D, D), linear_from_heads(N), ("attn.o_proj.kernel",)),
        ("attn.out_proj.bias", (D,), keep(), ("attn.o_proj.bias",)),
    )
    yield from _layered(prefix, "adapter.", None, rows)
    yield from _norm(f"{prefix}ln_q", "adapter.ln_q", D)
    yield from _norm(f"{prefix}ln_kv", "adapter.ln_kv", D)
    yield from _norm("transformer.visual.ln_post", "adapter.ln_post", D)
    # Used as x @ proj, so it is [in, out] already.
    yield Rule("transformer.visual.proj", (D, D), keep(), ("adapter.proj.kernel",))


def _layered(
    released: str, ours: str, num_layers: int | None, rows: tuple[tuple, ...]
) -> Iterator[Rule]:
    for name, shape, transform, paths in rows:
        full_paths = tuple(ours + path for path in paths)
        yield Rule(released + name, shape, transform, full_paths, num_layers)


def _norm(released: str, ours: str, size: int) -> Iterator[Rule]:
    yield Rule(f"{released}.weight", (size,), keep(), (f"{ours}.scale",))
    yield Rule(f"{released}.bias", (size,), keep(), (f"{ours}.bias",))


def _qkv(module: str, leaf: str) -> tuple[str, str, str]:
    return (f"{module}.q_proj.{leaf}", f"{module}.k_proj.{leaf}", f"{module}.v_proj.{leaf}")


def name_problems(
    rules: tuple[Rule, ...],
    shapes: dict[str, tuple[int, ...]],
    ignored: tuple[Ignored, ...] = (),
    is_excused: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Returns what keeps the released tensors and the rules from matching one to one.

    `shapes` are those found: released name -> shape. `is_excused` says which absent names have
    been complained about already, with the file they are in.
    """
    expected = {name: rule.shape for rule in rules for name in rule.names()}
    absent = [name for name in expected if name not in shapes and not is_excused(name)]
    problems = [f"{name} is missing" for name in absent]
    for name, shape in shapes.items():
        if name not in expected:
            if not any(re.fullmatch(entry.pattern, name) for entry in ignored):
                problems.append(f"{name} is unknown: got shape {shape}, expected no such tensor")
        elif shape != expected[name]:
            problems.append(
                f"{name} is misshapen: got {shape} ({math.prod(shape)} elements), expected "
                f"{expected[name]}; do config.json and the weights belong together?"
            )
    return problems
