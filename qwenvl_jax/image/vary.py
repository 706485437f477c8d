"""Pictures varied in training: lighter or darker, with more or less contrast and colour.

Nothing moves, so boxes, quads and "left of" stay true, and hues stay, so a red thing stays red.
"""

import random

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def varied(
    picture_YXC: UInt8[np.ndarray, "Y X 3"], strength: float, rng: random.Random
) -> UInt8[np.ndarray, "Y X 3"]:
    """Returns the picture with brightness, contrast and colour each times 1 - strength to 1 + it.

    `strength` lies in 0..1. The order of the three is drawn too.
    """
    image = Image.fromarray(picture_YXC)
    for enhancer in rng.sample(_ENHANCERS, len(_ENHANCERS)):
        image = enhancer(image).enhance(rng.uniform(1 - strength, 1 + strength))
    return np.asarray(image)
