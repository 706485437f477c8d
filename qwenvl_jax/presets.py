"""What configs are put together from: model sizes, and the tables of what trains in each stage."""

from qwenvl_jax.config import (
    AdapterConfig,
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    ParameterRule,
    VisionConfig,
)

# --- model sizes --------------------------------------------------------------------------------


def qwen_vl() -> ModelConfig:
    """Returns Qwen-VL as released: 9,656,935,168 parameters (`config.json` of the checkpoint)."""
    return ModelConfig(
        vision=VisionConfig(
            width=1664,
            num_layers=48,
            num_heads=16,
            mlp_dim=8192,
            patch_size=14,
            table_side=16,
        ),
        adapter=AdapterConfig(num_queries=256, num_heads=32),
        decoder=DecoderConfig(
            width=4096,
            num_layers=32,
            num_heads=32,
            head_dim=128,
            mlp_dim=11008,
            vocab_size=151_936,
            seq_length=2048,
            max_positions=8192,
        ),
        image_size=448,
        image_start_id=151_857,
    )


def nano(*, num_ranks: int = 1763, num_queries: int = 64) -> ModelConfig:
    """Returns the model that ships with the package: the same parts, 112-pixel pictures.

    `num_ranks` are those of its vocabulary; the special tokens stand behind them. Its
    earlier stages had 16 queries, then 36.
    """
    return ModelConfig(
        vision=VisionConfig(
            width=160,
            num_layers=5,
            num_heads=5,
            mlp_dim=640,
            patch_size=14,
            table_side=16,  # fixed by the released layout, so that export and import hold it
        ),
        adapter=AdapterConfig(num_queries=num_queries, num_heads=2),
        decoder=DecoderConfig(
            width=256,
            num_layers=4,
            num_heads=4,
            head_dim=64,
            mlp_dim=512,
            vocab_size=num_ranks + 217,
            seq_length=512,
            max_positions=2048,
        ),
        image_size=112,
        image_start_id=num_ranks + 214,
        remat="dots",  # on a CPU faster than keeping everything, which is bound by memory
    )


def released_lora() -> LoraConfig:
    """Returns the pairs that the original `finetune.py` adds with `--use_lora`."""
    return LoraConfig(
        rank=64,
        alpha=16.0,
        dropout=0.05,
        targets=(
            "decoder.blocks.attn.*",
            "decoder.blocks.mlp.gate_proj",
            "decoder.blocks.mlp.up_proj",
        ),
    )


# --- what trains --------------------------------------------------------------------------------

ParameterTable = tuple[ParameterRule, ...]


def stage_1(*, tower_decay: float = 0.95, weight_decay: float = 0.05) -> ParameterTable:
    """Returns the table of stage 1: tower and adapter trained, the decoder frozen (paper 3.1)."""
    return (
        ParameterRule("decoder.*", is_trained=False),
        *trained("vit.*", layer_decay=tower_decay, weight_decay=weight_decay),
        *trained("adapter.*", weight_decay=weight_decay),
    )


def stage_2(*, tower_decay: float = 0.95, weight_decay: float = 0.05) -> ParameterTable:
    """Returns the table of stage 2: everything trained (paper 3.2)."""
    return (
        *trained("vit.*", layer_decay=tower_decay, weight_decay=weight_decay),
        *trained("*", weight_decay=weight_decay),
    )


def stage_3(*, weight_decay: float = 0.05) -> ParameterTable:
    """Returns the table of stage 3: the tower frozen, adapter and decoder trained (paper 3.3)."""
    return (
        ParameterRule("vit.*", is_trained=False),
        *trained("*", weight_decay=weight_decay),
    )


def text_only(*, weight_decay: float = 0.05) -> ParameterTable:
    """Returns the table of a run without pictures: the decoder alone is trained."""
    return (
        ParameterRule("vit.*", is_trained=False),
        ParameterRule("adapter.*", is_trained=False),
        *trained("decoder.*", weight_decay=weight_decay),
    )


def released_finetune(*, weight_decay: float = 0.1) -> ParameterTable:
    """Returns what the original `finetune.py` trains with its default `fix_vit`.

    There the adapter's attention is switched on again after the whole of `visual` was frozen, but
    not the norm and the matrix behind it: drop these two rows to train the adapter whole.
    """
    return (
        ParameterRule("vit.*", is_trained=False),
        ParameterRule("adapter.ln_post.*", is_trained=False),
        ParameterRule("adapter.proj.*", is_trained=False),
        *trained("*", weight_decay=weight_decay),
    )


def adapter_only(*, weight_decay: float = 0.1) -> ParameterTable:
    """Returns the table of a fine-tune that trains 92 million parameters: the adapter's."""
    return (
        ParameterRule("vit.*", is_trained=False),
        ParameterRule("decoder.*", is_trained=False),
        *trained("adapter.*", weight_decay=weight_decay),
    )


def lora_only(*, weight_decay: float = 0.1, with_embeddings: bool = False) -> ParameterTable:
    """Returns the table of a LoRA fine-tune: the pairs of `ModelConfig.lora` alone are trained.

    `with_embeddings` trains embeddings and head too, as the original does with a base model, whose
    chat tokens never met training.
    """
    patterns = ["*.lora.*"]
    if with_embeddings:
        patterns += ["decoder.embed.*", "decoder.lm_head.*"]
    rows = (ParameterRule(pattern, weight_decay=weight_decay) for pattern in patterns)
    return (*rows, ParameterRule("*", is_trained=False))


def trained(pattern: str, *, weight_decay: float, layer_decay: float = 1.0) -> ParameterTable:
    """Returns three rows that train what `pattern` matches; norms and biases do not decay."""
    prefix = pattern.removesuffix("*")
    return (
        ParameterRule(f"{prefix}*.scale", layer_decay=layer_decay),
        ParameterRule(f"{prefix}*.bias", layer_decay=layer_decay),
        ParameterRule(pattern, layer_decay=layer_decay, weight_decay=weight_decay),
    )
