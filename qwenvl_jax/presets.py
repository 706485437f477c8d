"""The model sizes that this project trains and loads: the released and the small shipped one."""

from qwenvl_jax.config import AdapterConfig, DecoderConfig, ModelConfig, VisionConfig


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


def nano() -> ModelConfig:
    """Returns the model that ships with the package: the same parts, 112-pixel pictures."""
    return ModelConfig(
        vision=VisionConfig(
            width=160,
            num_layers=5,
            num_heads=5,
            mlp_dim=640,
            patch_size=14,
            table_side=16,  # fixed by the released layout, so that export and import hold it
        ),
        adapter=AdapterConfig(num_queries=16, num_heads=2),
        decoder=DecoderConfig(
            width=256,
            num_layers=4,
            num_heads=4,
            head_dim=64,
            mlp_dim=512,
            vocab_size=739,
            seq_length=512,
            max_positions=2048,
        ),
        image_size=112,
        image_start_id=736,
        remat="dots",  # on a CPU faster than keeping everything, which is bound by memory
    )
