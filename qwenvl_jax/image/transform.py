"""Pixels of any size -> the square the vision tower reads, still uint8.

Dividing by 255 and subtracting the mean happen on the device, in `model`: a byte travels four
times lighter than a float.

Axes: Y rows, X columns, C colours (see `qwenvl_jax.axes`); S the side of the square.
"""

import operator
from typing import SupportsIndex

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def to_square(picture: np.ndarray | Image.Image, size: SupportsIndex) -> UInt8[np.ndarray, "S S 3"]:
    """The picture stretched to uint8[size, size, 3] with PIL's bicubic filter.

    `picture` is uint8[Y, X, 3], or an RGB image of `open_image`: the same without a copy between.
    The result is not to be written to.

    The aspect ratio is not kept, and boxes are relative to the sides, so they need no change. PIL
    widens the filter when it shrinks (antialiasing), which other bicubic resizes do not.

    Raises:
      ValueError: pixels that are not uint8[Y, X, 3] or RGB, or a size below 1.

    Source: released `visual.py`, the picture transform.
    """
    side = operator.index(size)
    if side < 1:
        raise ValueError(f"the side of the square must be positive: got {side}")
    image = picture if isinstance(picture, Image.Image) else _from_pixels(picture)
    if image.mode != "RGB":
        raise ValueError(
            f"expected an image of mode RGB: got {image.mode}; open it with open_image"
        )
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def _from_pixels(image_YXC: np.ndarray) -> Image.Image:
    is_rgb = image_YXC.ndim == 3 and image_YXC.shape[2] == 3 and image_YXC.size > 0
    if image_YXC.dtype != np.uint8 or not is_rgb:
        raise ValueError(
            f"expected pixels as uint8 (height, width, 3): got {image_YXC.dtype} "
            f"{image_YXC.shape}; read the picture with load_image"
        )
    return Image.fromarray(np.ascontiguousarray(image_YXC))
