"""Files <-> pixels: one safe loader, one transform. No jax: data workers import this."""

from qwenvl_jax.image.decode import ImageError
from qwenvl_jax.image.load import load_image
from qwenvl_jax.image.transform import to_square

__all__ = ["ImageError", "load_image", "to_square"]
