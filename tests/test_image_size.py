"""Width and height from a header: those of the decoded picture, without decoding it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_jax.image import ImageError, load_image
from qwenvl_jax.image.load import image_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def encode(kind: str, **options) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(3).integers(0, 256, (23, 31, 3), np.uint8)
    Image.fromarray(pixels).save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_size_is_that_of_the_pixels_and_none_is_decoded(kind, monkeypatch):
    encoded = encode(kind)
    height, width, _ = load_image(encoded).shape
    for plugin in ("JpegImagePlugin.JpegImageFile", "PngImagePlugin.PngImageFile"):
        monkeypatch.setattr(f"PIL.{plugin}.load", lambda self: pytest.fail("decoded"))
    assert image_size(encoded) == (width, height) == (31, 23)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_turned_pictures_have_turned_sizes(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode(kind, exif=exif)
    height, width, _ = load_image(encoded).shape
    assert image_size(encoded) == (width, height)


def test_too_many_pixels_and_no_picture_are_refused():
    with pytest.raises(ImageError, match="got 31 x 23 = 713 pixels, expected at most 712"):
        image_size(encode("PNG"), max_pixels=712)
    with pytest.raises(ImageError, match="HTML page"):
        image_size(b"<html>")


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damage_gives_a_size_or_an_own_message(kind, data):
    encoded = bytearray(encode(kind))
    for _ in range(data.draw(st.integers(1, 8))):
        encoded[data.draw(st.integers(0, min(len(encoded), 200) - 1))] = data.draw(
            st.integers(0, 255)
        )
    try:
        width, height = image_size(bytes(encoded))
    except ImageError as error:
        told = str(error)
        width = height = 1
    else:
        told = ""
    assert 0 < width * height <= 25_000_000
    assert "0x" not in told
