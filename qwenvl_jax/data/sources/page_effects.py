"""What a camera does to a page: grain, tint, shadow, contrast, blur. Nothing here moves a point.

Ranges are the published defaults of SynthDoG. Amounts in pixels are for its pictures of 720 pixels
and more; `scale` makes them smaller with the picture, or small pictures could not be read.
"""

import math
import random

import numpy as np
from PIL import Image, ImageChops, ImageFilter

_PAPER = (0.0, 0.2)  # strength of the paper's texture
_NOISE = (0.0, 8.0)  # standard deviation of the page's grain, in 0..255
_ROUGH = (0.0, 1.0)  # pixels that the ink's edges are frayed by ("elastic" there)
_TINT_CHANCE, _TINT = 0.2, (0.0, 0.2)
_SHADOW = (0.0, 160.0)  # how much darker, at most, in 0..255
_SHADOW_SOFT = (0.5, 1.0)  # of the picture: over which the shadow fades
_CONTRAST, _BRIGHTNESS = (1.0, 1.5), (-48.0, 0.0)
_MOTION_CHANCE, _MOTION = 0.5, (3, 5)  # pixels
_BLUR = (0.0, 1.5)  # sigma, pixels
_LIFT = 0.6  # of the shadow is the most that contrast and brightness may add to it


def paper(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Returns blank paper: nearly white, with fibres and stains."""
    shade = rng.randint(225, 255)
    noise = np.random.default_rng(rng.getrandbits(63))
    texture = Image.new("L", size)
    for grains, weight in ((6, 0.6), (90, 0.4)):
        width, height = (max(2, grains * side // max(size)) for side in size)
        small = Image.fromarray(noise.integers(0, 256, (height, width), np.uint8))
        layer = small.resize(size, Image.Resampling.BILINEAR)
        texture = ImageChops.add(texture, layer.point([round(weight * v) for v in range(256)]))
    strength = rng.uniform(*_PAPER)
    dark = texture.point([round(shade - strength * 0.5 * (255 - v)) for v in range(256)])
    return Image.merge(
        "RGB", [dark.point([max(0, v - rng.randint(0, 12)) for v in range(256)])] * 3
    )


def roughened(ink: Image.Image, rng: random.Random, scale: float) -> Image.Image:
    """Returns a layer of ink ("L") whose pixels are mixed with random neighbours."""
    amount = rng.uniform(*_ROUGH) * scale
    noise = np.random.default_rng(rng.getrandbits(63))
    flat = np.asarray(ink).ravel()
    steps = noise.integers(0, 4, flat.size, np.uint8)
    offsets = np.array([1, -1, ink.width, -ink.width])[steps]
    near = flat.take(np.arange(flat.size) + offsets, mode="wrap")
    moved = Image.fromarray(near.reshape(ink.height, ink.width))
    return Image.blend(ink, moved, amount / 2)


def grain(image: Image.Image, rng: random.Random) -> Image.Image:
    """Returns the picture with normal noise, the same in all colours."""
    deviation = rng.uniform(*_NOISE)
    noise = np.random.default_rng(rng.getrandbits(63))
    normal = noise.standard_normal((image.height, image.width), np.float32)
    layer = Image.fromarray((normal * deviation + 128).clip(0, 255).astype(np.uint8))
    return ImageChops.add(image, Image.merge("RGB", [layer] * 3), 1, -128)


def photographed(image: Image.Image, rng: random.Random, scale: float) -> Image.Image:
    """Returns the picture as a camera takes it: tinted, shaded, contrasted, darkened, blurred."""
    if rng.random() < _TINT_CHANCE:
        colour = (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
        image = Image.blend(image, Image.new("RGB", image.size, colour), rng.uniform(*_TINT))
    image = ImageChops.subtract(image, _shadow(image.size, rng))
    contrast, brightness = rng.uniform(*_CONTRAST), rng.uniform(*_BRIGHTNESS)
    # Around the middle gray of a page, not of the scale: a shadow must not swallow the ink.
    table = [round(min(255, max(0, contrast * (v - 160) + 160 + brightness))) for v in range(256)]
    image = image.point(table * 3)
    if rng.random() < _MOTION_CHANCE:
        image = _moved(image, rng, scale)
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(*_BLUR) * scale))


def _shadow(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """Returns what a shadow from one side takes away, RGB."""
    amount, depth = rng.random(), rng.uniform(*_SHADOW) * _LIFT
    soft, angle = rng.uniform(*_SHADOW_SOFT), rng.uniform(0, 2 * math.pi)
    ys_YX, xs_YX = np.mgrid[0:48, 0:48] / 47 - 0.5
    along_YX = 0.5 + (xs_YX * math.cos(angle) + ys_YX * math.sin(angle)) / math.sqrt(2)
    dark_YX = np.clip((amount - along_YX) / soft + 0.5, 0, 1) * depth
    layer = Image.fromarray(dark_YX.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    return Image.merge("RGB", [layer] * 3)


def _moved(image: Image.Image, rng: random.Random, scale: float) -> Image.Image:
    """Returns the picture blurred along a line of 3 to 5 pixels, or of fewer where it is small."""
    length, angle = rng.randint(*_MOTION) * scale, rng.uniform(0, math.pi)
    kernel = np.zeros((5, 5))
    for along in np.linspace(-length / 2, length / 2, 21):
        x, y = 2 + along * math.cos(angle), 2 + along * math.sin(angle)
        kernel[round(min(4, max(0, y))), round(min(4, max(0, x)))] += 1
    return image.filter(ImageFilter.Kernel((5, 5), kernel.ravel().tolist(), float(kernel.sum())))
