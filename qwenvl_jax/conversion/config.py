"""Our ModelConfig from a released `config.json`, and back.

The released file holds sizes only. How to compute (dtypes, attention backend, remat) is ours to
choose and is left at its default.
"""

import math
from pathlib import Path
from typing import Any

from qwenvl_jax.config import AdapterConfig, ConfigError, DecoderConfig, ModelConfig, VisionConfig
from qwenvl_jax.conversion.slots import ConversionError

RELEASED_TABLE_SIDE = 16  # the released tower has this table at every image size
RELEASED_ADAPTER_HEAD_DIM = 128
RELEASED_NORM_EPS = 1e-6  # of every vision norm; not in the released file
DEFAULT_QUERIES = 256
_WHOLE, _NUMBER = (int,), (int, float)
_LARGEST = 1e12  # of any number here; nor infinity, nor NaN
# What may be left out, and what it must be where it is there.
_VISUAL_OPTIONS = {"n_queries": _WHOLE}
_DECODER_OPTIONS = {
    "kv_channels": _WHOLE,
    "max_position_embeddings": _WHOLE,
    "rotary_emb_base": _NUMBER,
    "layer_norm_epsilon": _NUMBER,
    "use_dynamic_ntk": (bool,),
    "use_logn_attn": (bool,),
}
_KINDS = {_WHOLE: "a whole number", _NUMBER: "a number", (bool,): "true or false"}
# What the released modelling code can vary and ours does not.
FIXED = {
    "rotary_pct": 1.0,
    "no_bias": True,
    "tie_word_embeddings": False,
    "scale_attn_weights": True,
}


def model_config_from_released(
    released: dict[str, Any], where: str | Path = "config.json"
) -> ModelConfig:
    """Returns the sizes that a released Qwen-VL `config.json` describes.

    Raises:
        ConversionError: fields are missing, or describe a model that ours cannot be.
    """
    visual = released.get("visual")
    if not isinstance(visual, dict):
        raise ConversionError(
            where,
            ["has no `visual` object: not Qwen-VL; a language model alone goes in with --llm"],
        )
    problems = _bad_sizes(
        visual,
        ("width", "layers", "heads", "patch_size", "image_size", "image_start_id", "output_dim"),
        "visual.",
    )
    problems += _bad_sizes(visual, ("mlp_ratio",), "visual.", _NUMBER)
    problems += _bad_options(visual, _VISUAL_OPTIONS, "visual.")
    problems += _decoder_problems(released)
    if not problems and visual["output_dim"] != released["hidden_size"]:
        problems.append(
            f"visual.output_dim must equal hidden_size: got {visual['output_dim']} and "
            f"{released['hidden_size']}"
        )
    if problems:
        raise ConversionError(where, problems)
    decoder = decoder_config_from_released(released, where)
    try:
        return ModelConfig(
            vision=VisionConfig(
                width=visual["width"],
                num_layers=visual["layers"],
                num_heads=visual["heads"],
                mlp_dim=int(visual["width"] * visual["mlp_ratio"]),
                patch_size=visual["patch_size"],
                table_side=RELEASED_TABLE_SIDE,
                norm_eps=RELEASED_NORM_EPS,
            ),
            adapter=AdapterConfig(
                num_queries=visual.get("n_queries", DEFAULT_QUERIES),
                num_heads=visual["output_dim"] // RELEASED_ADAPTER_HEAD_DIM,
                norm_eps=RELEASED_NORM_EPS,
            ),
            decoder=decoder,
            image_size=visual["image_size"],
            image_start_id=visual["image_start_id"],
        )
    except ConfigError as error:
        raise ConversionError(where, [str(error)]) from error


def decoder_config_from_released(
    released: dict[str, Any], where: str | Path = "config.json"
) -> DecoderConfig:
    """Returns the language model's sizes, from the file of Qwen-VL or of Qwen-7B."""
    problems = _decoder_problems(released)
    if problems:
        raise ConversionError(where, problems)
    try:
        return DecoderConfig(
            width=released["hidden_size"],
            num_layers=released["num_hidden_layers"],
            num_heads=released["num_attention_heads"],
            head_dim=released.get("kv_channels", 128),
            mlp_dim=released["intermediate_size"] // 2,  # the file counts gate and up together
            vocab_size=released["vocab_size"],
            seq_length=released["seq_length"],
            max_positions=released.get("max_position_embeddings", 8192),
            rope_base=float(released.get("rotary_emb_base", 10_000)),
            norm_eps=released.get("layer_norm_epsilon", 1e-6),
            use_dynamic_ntk=released.get("use_dynamic_ntk", True),
            use_logn=released.get("use_logn_attn", True),
        )
    except ConfigError as error:
        raise ConversionError(where, [str(error)]) from error


def model_config_from_parts(
    openclip: dict[str, Any], qwen_7b: dict[str, Any], *, image_start_id: int, num_queries: int
) -> ModelConfig:
    """Returns the sizes of a tower and a language model joined by a new adapter.

    `openclip` is an `open_clip_config.json`, `qwen_7b` a released `config.json`.

    Raises:
        ConversionError: naming the fields that are missing or impossible.
    """
    where = "open_clip_config.json"
    vision, problems = _vision_settings(openclip)
    if not problems and vision["width"] % vision["head_width"]:
        problems.append(
            "model_cfg.vision_cfg.width must be a multiple of head_width: got "
            f"{vision['width']} and {vision['head_width']}"
        )
    if problems:
        raise ConversionError(where, problems)
    decoder = decoder_config_from_released(qwen_7b)
    try:
        return ModelConfig(
            vision=VisionConfig(
                width=vision["width"],
                num_layers=vision["layers"],
                num_heads=vision["width"] // vision["head_width"],
                mlp_dim=int(vision["width"] * vision["mlp_ratio"]),
                patch_size=vision["patch_size"],
                table_side=vision["image_size"] // vision["patch_size"],
            ),
            adapter=AdapterConfig(
                num_queries=num_queries, num_heads=decoder.width // RELEASED_ADAPTER_HEAD_DIM
            ),
            decoder=decoder,
            image_size=vision["image_size"],
            image_start_id=image_start_id,
        )
    except ConfigError as error:
        raise ConversionError(where, [str(error)]) from error


def _vision_settings(openclip: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns an OpenCLIP tower's settings, and what of them is wrong."""
    model = openclip.get("model_cfg")
    given = model.get("vision_cfg") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(given, dict):
        return {}, ["model_cfg.vision_cfg must be an object: got none; name an OpenCLIP folder"]
    vision = {"head_width": 64, "mlp_ratio": 4.0}  # what OpenCLIP assumes when they are left out
    vision |= given
    prefix = "model_cfg.vision_cfg."
    names = ("width", "layers", "head_width", "patch_size", "image_size")
    problems = _bad_sizes(vision, names, prefix)
    problems += _bad_sizes(vision, ("mlp_ratio",), prefix, _NUMBER)
    # Ours is the exact GELU.
    if model.get("quick_gelu"):
        problems.append(f"model_cfg.quick_gelu must be false: got {model['quick_gelu']}")
    if vision.get("act_kwargs"):
        problems.append(f"{prefix}act_kwargs must be empty: got {vision['act_kwargs']}")
    return vision, problems


def released_config(config: ModelConfig, torch_dtype: str) -> dict[str, Any]:
    """Returns the `config.json` that the released PyTorch code and our import read back.

    Raises:
        ConversionError: the released code has no setting for one of these sizes.
    """
    vision, adapter, decoder = config.vision, config.adapter, config.decoder
    problems = _unreleasable(config)
    if problems:
        raise ConversionError("this model, in the released format,", problems)
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "torch_dtype": torch_dtype,
        "bf16": torch_dtype == "bfloat16",
        "fp16": torch_dtype == "float16",
        "fp32": torch_dtype == "float32",
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "kv_channels": decoder.head_dim,
        "intermediate_size": 2 * decoder.mlp_dim,
        "seq_length": decoder.seq_length,
        "max_position_embeddings": decoder.max_positions,
        "layer_norm_epsilon": decoder.norm_eps,
        "rotary_emb_base": decoder.rope_base,
        "use_dynamic_ntk": decoder.use_dynamic_ntk,
        "use_logn_attn": decoder.use_logn,
        "initializer_range": 0.02,
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        **FIXED,
        "visual": {
            "width": vision.width,
            "layers": vision.num_layers,
            "heads": vision.num_heads,
            "mlp_ratio": mlp_ratio(vision.width, vision.mlp_dim),
            "patch_size": vision.patch_size,
            "image_size": config.image_size,
            "image_start_id": config.image_start_id,
            "output_dim": decoder.width,
            "n_queries": adapter.num_queries,
        },
    }


def mlp_ratio(width: int, mlp_dim: int) -> float:
    """Returns the shortest ratio with `int(width * ratio) == mlp_dim`.

    >>> mlp_ratio(1664, 8192)
    4.9231
    """
    for digits in range(4, 17):
        ratio = round(mlp_dim / width, digits)
        if int(width * ratio) == mlp_dim:
            return ratio
    return math.nextafter(mlp_dim / width, math.inf)


def _unreleasable(config: ModelConfig) -> list[str]:
    vision, adapter, decoder = config.vision, config.adapter, config.decoder
    rules = (
        ("vision.table_side", vision.table_side, RELEASED_TABLE_SIDE),
        ("vision.attention", vision.attention, "global"),
        ("vision.norm_eps", vision.norm_eps, RELEASED_NORM_EPS),
        ("adapter.norm_eps", adapter.norm_eps, RELEASED_NORM_EPS),
        ("adapter.num_heads (width // 128)", adapter.num_heads,
         decoder.width // RELEASED_ADAPTER_HEAD_DIM),
        ("decoder.num_heads * head_dim (width)", decoder.num_heads * decoder.head_dim,
         decoder.width),
    )  # fmt: skip
    return [
        f"{name} must be {expected}: got {got}; keep this model in its own format"
        for name, got, expected in rules
        if got != expected
    ]


def _decoder_problems(released: dict[str, Any]) -> list[str]:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    problems = _bad_sizes(released, (*sizes, "intermediate_size", "seq_length"))
    problems += _bad_options(released, _DECODER_OPTIONS)
    return problems + [
        f"{name} must be {value}: got {released[name]}"
        for name, value in FIXED.items()
        if released.get(name, value) != value
    ]


def _bad_sizes(
    fields: dict[str, Any],
    names: tuple[str, ...],
    prefix: str = "",
    kinds: tuple[type, ...] = _WHOLE,
) -> list[str]:
    return [
        f"{prefix}{name} must be {_KINDS[kinds]}: got {fields.get(name)!r:.60}"
        for name in names
        if not _is_of(fields.get(name), kinds)
    ]


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    """Returns whether a value is of a kind, and of a size that a model may have."""
    return type(value) in kinds and (isinstance(value, bool) or -_LARGEST < value < _LARGEST)


def _bad_options(
    fields: dict[str, Any], kinds: dict[str, tuple[type, ...]], prefix: str = ""
) -> list[str]:
    return [
        f"{prefix}{name} must be {_KINDS[kind]}, or left out: got {fields[name]!r:.60}"
        for name, kind in kinds.items()
        if name in fields and not _is_of(fields[name], kind)
    ]
