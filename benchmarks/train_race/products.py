"""The matrix products of a step of the race, of layers and head, alone: what the libraries do.

Every kernel has three: with its input, and the gradients of both. They are the most of a step that
no code around them can change.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
from train_race import mid_size


def _kernels() -> list[tuple[int, int, int, int]]:
    """Returns (rows, inputs, outputs, times a step) of every kind of kernel."""
    config, batch = mid_size.model_config("float32"), mid_size.batch()
    vision, decoder = config.vision, config.decoder
    patches = mid_size.ROWS * (config.image_size // vision.patch_size) ** 2
    tokens = mid_size.ROWS * mid_size.LENGTH
    scored = int((batch.loss_weight > 0).sum())
    return [
        (patches, vision.width, vision.width, 4 * vision.num_layers),
        (patches, vision.width, vision.mlp_dim, vision.num_layers),
        (patches, vision.mlp_dim, vision.width, vision.num_layers),
        (tokens, decoder.width, decoder.width, 4 * decoder.num_layers),
        (tokens, decoder.width, decoder.mlp_dim, 2 * decoder.num_layers),
        (tokens, decoder.mlp_dim, decoder.width, decoder.num_layers),
        (scored, decoder.width, decoder.vocab_size, 1),
    ]


def _products() -> list[tuple[np.ndarray, np.ndarray, str, int]]:
    """Returns (left, right, which of them is transposed, times a step) of every product."""
    draw, found = np.random.default_rng(0), []
    for rows, inputs, outputs, times in _kernels():
        x, kernel, grad = (
            draw.standard_normal(shape, np.float32)
            for shape in ((rows, inputs), (inputs, outputs), (rows, outputs))
        )
        found += [(x, kernel, "", times), (grad, kernel, "right", times), (x, grad, "left", times)]
    return found


def num_operations() -> int:
    """Returns the multiplications and additions of all of them."""
    return sum(6 * rows * inputs * outputs * n for rows, inputs, outputs, n in _kernels())


def jax_products() -> Callable[[], None]:
    """Returns a function that makes them all with XLA."""
    import jax

    @partial(jax.jit, static_argnums=2)
    def product(left, right, turned):
        return (left.T if turned == "left" else left) @ (right.T if turned == "right" else right)

    made = [(jax.device_put((a, b)), turned, n) for a, b, turned, n in _products()]

    def run() -> None:
        for pair, turned, times in made:
            for _ in range(times):
                product(*pair, turned).block_until_ready()

    return run


def torch_products() -> Callable[[], None]:
    """Returns a function that makes them all with PyTorch."""
    import torch

    made = []
    for left, right, turned, times in _products():
        a, b = torch.from_numpy(left), torch.from_numpy(right)
        made.append((a.T if turned == "left" else a, b.T if turned == "right" else b, times))

    def run() -> None:
        for a, b, times in made:
            for _ in range(times):
                torch.mm(a, b)

    return run
