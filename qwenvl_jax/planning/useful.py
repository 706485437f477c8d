"""The floating-point work that a step needs, whatever it recomputes: what MFU counts.

Two for every weight a token or patch meets going forward, as much again for the gradient of what
went in, and again for the gradient of a trained weight. A frozen part has no weight gradient, and
nothing goes back through a part with nothing trained in or before it. Causal attention is counted
once, half of the square. Every token and every picture slot of a row counts, as they are computed
whether filled or not.
"""

import dataclasses

from qwenvl_jax.config import ModelConfig, TrainConfig
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.training.optimizer import plan_parameters, trained_parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Operations of the forward pass, by part: of one picture, and of one token or row."""

    vit: float  # a picture
    adapter: float  # a picture
    decoder: float  # a row, head included


def forward_work(model: ModelConfig, image_size: int, length: int) -> Forward:
    """Returns the work of one picture of `image_size` pixels and of one row of `length` tokens."""
    vision, adapter, decoder = model.vision, model.adapter, model.decoder
    patches = (image_size // vision.patch_size) ** 2
    E, D, Q = vision.width, decoder.width, adapter.num_queries
    block = 4 * E * E + 2 * E * vision.mlp_dim
    embed = vision.patch_size**2 * 3 * E
    vit = 2 * patches * (vision.num_layers * (block + 2 * patches * E) + embed)
    resample = patches * (E * D + 2 * D * D) + Q * (3 * D * D + 2 * patches * D)
    heads = decoder.num_heads * decoder.head_dim
    layer = 4 * D * heads + 3 * D * decoder.mlp_dim + length * heads
    text = 2 * length * (decoder.num_layers * layer + D * decoder.vocab_size)
    return Forward(vit=float(vit), adapter=2.0 * resample, decoder=float(text))


def useful_flops(config: TrainConfig) -> float:
    """Returns the work of one optimizer step over the whole batch, all chips together."""
    data = config.data
    work = forward_work(config.model, data.image_size, data.length)
    _, abstract = abstract_state(config.model)
    trained = trained_parts(plan_parameters(abstract, config.parameters))
    total, is_any_trained = 0.0, False
    for part, per_row in (
        ("vit", work.vit * data.max_images),
        ("adapter", work.adapter * data.max_images),
        ("decoder", work.decoder),
    ):
        is_trained = part in trained
        is_any_trained |= is_trained
        total += data.rows * per_row * (1 + is_any_trained + is_trained)
    return total
