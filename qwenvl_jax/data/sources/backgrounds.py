"""What lies behind things and pages: plain colours, gradients, soft noise, and photos of a folder.

Everything is pure in the random stream that is handed in.
"""

import functools
import random
from pathlib import Path

import numpy as np
from PIL import Image

from qwenvl_jax.data.example import DataError
from qwenvl_jax.image.decode import ImageError
from qwenvl_jax.image.load import load_image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_SIDE = 2048  # pixels kept of a photo
Colour = tuple[int, int, int]


@functools.lru_cache(maxsize=8)
def photo_files(folder: Path | None) -> tuple[Path, ...]:
    """Returns the pictures below a folder, sorted; none for None.

    Raises: DataError where the folder does not exist or holds no picture.
    """
    if folder is None:
        return ()
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise DataError(
            f"the folder of photos {folder} holds no picture: expected {', '.join(_SUFFIXES)} "
            "files in it; give another folder, or none for drawn backgrounds"
        )
    return tuple(found)


def background(
    rng: random.Random, size: tuple[int, int], base: Colour, photos: tuple[Path, ...] = ()
) -> Image.Image:
    """Returns an RGB picture of that width and height, mostly around the colour `base`.

    Where there are photos, half of the pictures are a piece of one.

    Raises: DataError for a photo that cannot be read.
    """
    if photos and rng.random() < 0.5:
        return photo(rng, size, rng.choice(photos))
    kind = rng.random()
    if kind < 0.4:
        return Image.new("RGB", size, base)
    if kind < 0.7:
        return gradient(rng, size, base, spread=40)
    return clouds(rng, size, base, spread=rng.uniform(6, 40))


def muted(rng: random.Random) -> Colour:
    """Returns a colour; most are pale, as walls and skies are."""
    gray, strength = rng.randint(60, 235), rng.uniform(0.1, 0.8)
    red, green, blue = (round(gray + strength * (rng.randint(0, 255) - gray)) for _ in "rgb")
    return red, green, blue


def gradient(rng: random.Random, size: tuple[int, int], base: Colour, spread: int) -> Image.Image:
    """Returns a picture whose four corners differ from `base` by up to `spread`."""
    corners_YXC = np.array(
        [[[value + rng.uniform(-spread, spread) for value in base] for _ in "lr"] for _ in "tb"]
    )
    corners = Image.fromarray(np.clip(corners_YXC, 0, 255).astype(np.uint8))
    # Only the middle of the two by two pixels is a ramp; their outer halves would be flat.
    return corners.resize(size, Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))


def clouds(rng: random.Random, size: tuple[int, int], base: Colour, spread: float) -> Image.Image:
    """Returns `base` with noise of several grains, as of paper, walls or cloth."""
    field_YX = noise_field(rng, size)
    pixels_YXC = np.asarray(base, np.float32) + spread * field_YX[:, :, None]
    return Image.fromarray(np.clip(pixels_YXC, 0, 255).astype(np.uint8))


def noise_field(rng: random.Random, size: tuple[int, int]) -> np.ndarray:
    """Returns float32 [Y, X] of mean about 0 and reach about 1: coarse to fine noise, summed."""
    width, height = size
    noise = np.random.default_rng(rng.getrandbits(63))
    field_YX = np.zeros((height, width), np.float32)
    for grains, weight in ((3, 0.5), (12, 0.3), (60, 0.2)):
        small = noise.uniform(-1, 1, (grains + 1, grains + 1)).astype(np.float32)
        field_YX += weight * np.asarray(
            Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        )
    return field_YX


def photo(rng: random.Random, size: tuple[int, int], path: Path) -> Image.Image:
    """Returns a random piece of a photo, of that shape and size.

    Raises: DataError where it cannot be read.
    """
    whole = _photo(path)
    width, height = size
    scale = min(whole.width / width, whole.height / height) * rng.uniform(0.6, 1.0)
    left = rng.uniform(0, whole.width - width * scale)
    top = rng.uniform(0, whole.height - height * scale)
    box = (left, top, left + width * scale, top + height * scale)
    return whole.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


@functools.lru_cache(maxsize=16)
def _photo(path: Path) -> Image.Image:
    try:
        image = Image.fromarray(load_image(path))
    except ImageError as error:
        raise DataError(str(error)) from error
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    return image
