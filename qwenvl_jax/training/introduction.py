"""What a person wants to know before the first step."""

from qwenvl_jax.config import TrainConfig
from qwenvl_jax.training.memory import bytes_per_device
from qwenvl_jax.training.optimizer import describe_plan
from qwenvl_jax.training.state import Layout


def introduction(config: TrainConfig, layout: Layout, first_step: int) -> list[str]:
    """Returns lines: what trains, memory a device, what a step is, where the run stands."""
    data = config.data
    size = {name: bytes_per_device(part) / 1e9 for name, part in layout.abstract._asdict().items()}
    start = f"resumes after step {first_step}" if first_step else f"starts from {config.init}"
    return [
        describe_plan(layout.model_state, layout.plan),
        f"mesh {dict(layout.mesh.shape)}, {layout.mesh.devices.flat[0].device_kind}; GB a device: "
        f"trained {size['trainable']:.3f}, frozen {size['frozen']:.3f}, "
        f"optimizer {size['optimizer']:.3f}",
        f"a step: {data.rows} rows x {data.length} tokens, at most {data.max_images} pictures "
        f"a row of {data.image_size} x {data.image_size}, {config.micro_batches} micro-batches",
        f"{config.run_dir}: {start}, {config.steps} steps",
    ]
