"""Every row of the decode table: what goes in, which pixels or which error come out."""

import base64
import inspect
import io
import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_jax.image import ImageError, load_image, to_square
from qwenvl_jax.image import load as load_module
from qwenvl_jax.image.load import open_image

RED, BLUE, WHITE = [255, 0, 0], [0, 0, 255], [255, 255, 255]
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def noise(width: int = 31, height: int = 23) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def data_url(payload: bytes, header: str = "data:image/png;base64") -> str:
    return header + "," + base64.b64encode(payload).decode()


# --- sources ------------------------------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path):
    image = noise()
    expected = np.array(image)
    encoded = encode(image)
    path = tmp_path / "照片 e\u0301.png"
    path.write_bytes(encoded)
    sources = [
        path, str(path), encoded, bytearray(encoded), memoryview(encoded), image, expected,
        expected[:, :, ::-1][:, :, ::-1], data_url(encoded),
    ]  # fmt: skip
    for source in sources:
        result = load_image(source)
        assert result.dtype == np.uint8
        np.testing.assert_array_equal(result, expected)


def test_the_result_is_the_callers_own():
    source = np.zeros((2, 3, 3), np.uint8)
    result = load_image(source)
    result[:] = 9
    assert source.max() == 0


def test_gray_and_rgba_arrays():
    gray = np.array([[0, 7, 200]], np.uint8)
    np.testing.assert_array_equal(load_image(gray), np.stack([gray] * 3, -1))
    rgba = np.array([[[255, 0, 0, 255], [9, 9, 9, 0]]], np.uint8)
    assert load_image(rgba).tolist() == [[RED, WHITE]]


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.zeros((2, 2, 3), np.float32), "uint8.*got float32"),
        (np.zeros((3, 5, 5), np.uint8), r"\(3, 5, 5\).*transpose\(1, 2, 0\)"),
        (np.zeros((5, 5, 2), np.uint8), r"got \(5, 5, 2\)"),
        (np.zeros((1, 5, 5, 3), np.uint8), r"got \(1, 5, 5, 3\)"),
        (np.zeros((0, 5, 3), np.uint8), "got 5 x 0"),
        (np.zeros((6, 6), np.uint8), "got 6 x 6 = 36 pixels, expected at most 35"),
    ],
)
def test_unusable_arrays_are_named(pixels, words):
    with pytest.raises(ImageError, match=words):
        load_image(pixels, max_pixels=35)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_pil_image_that_was_not_read_yet_is_an_own_error(kind):
    encoded = encode(noise(), kind)
    lazy = Image.open(io.BytesIO(encoded[: len(encoded) * 2 // 3] if kind != "WEBP" else encoded))
    if kind == "WEBP":  # which is decoded from memory, and there opened whole or not at all
        lazy.close()
    with pytest.raises(ImageError, match="the PIL image cannot be decoded: got one that is trunc"):
        load_image(lazy)


@pytest.mark.parametrize("is_read", [True, False])
def test_a_closed_pil_image_is_an_own_error(is_read):
    image = Image.open(io.BytesIO(encode(noise())))
    if is_read:
        image.load()
    image.close()
    with pytest.raises(ImageError, match="damaged or closed"):
        load_image(image)


def test_memory_that_runs_out_is_no_damage(monkeypatch):
    def out_of_memory(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", out_of_memory)
    with pytest.raises(MemoryError):
        load_image(noise())


@pytest.mark.parametrize("is_read", [True, False])
def test_a_tiff_of_pillow_is_turned_once(tmp_path, is_read):
    image = noise()
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.tif", exif=exif)
    with Image.open(tmp_path / "a.tif") as opened:
        if is_read:
            opened.load()
        np.testing.assert_array_equal(load_image(opened), np.rot90(np.array(image), -1))


def test_other_types_are_refused():
    unchecked = inspect.unwrap(open_image)  # outside the tests no annotation is checked
    with pytest.raises(TypeError, match="got list, expected a path, bytes"):
        unchecked([[1, 2], [3, 4]])


# --- what Pillow alone would get wrong ----------------------------------------------------------


def test_16_bit_gray_is_scaled_not_clipped():
    gray = np.array([[0, 257 * 127, 257 * 128, 65535]], np.uint16)
    expected = [[[v] * 3 for v in (0, 127, 128, 255)]]
    assert load_image(encode(Image.fromarray(gray))).tolist() == expected
    assert load_image(Image.fromarray(gray)).tolist() == expected


def test_transparent_16_bit_gray_is_white():
    gray = np.array([[0, 65535 // 3]], np.uint16)
    encoded = encode(Image.fromarray(gray), transparency=0)
    assert load_image(encoded).tolist() == [[WHITE, [85, 85, 85]]]


def png16_rgb(pixels: list[tuple[int, int, int]], transparent: tuple[int, int, int]) -> bytes:
    """One row of 16-bit RGB with a transparent colour: Pillow cannot write these."""
    rows = b"\0" + b"".join(struct.pack(">HHH", *p) for p in pixels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", struct.pack(">IIBBBBB", len(pixels), 1, 16, 2, 0, 0, 0))
        + png_chunk(b"tRNS", struct.pack(">HHH", *transparent))
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def test_transparent_16_bit_colour_is_white():
    seen, hidden = (0xFFFF, 0, 0), (0x1234, 0x5678, 0x9ABC)
    assert load_image(png16_rgb([seen, hidden], hidden)).tolist() == [[RED, WHITE]]


@pytest.mark.parametrize(("bits", "row"), [(2, 0b01_10_00_11), (4, 0x5A)])
def test_transparent_gray_of_few_bits_is_white(bits, row):
    num, most = 8 // bits, (1 << bits) - 1
    values = [row >> bits * place & most for place in reversed(range(num))]
    encoded = b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            png_chunk(b"IHDR", struct.pack(">IIBBBBB", num, 1, bits, 0, 0, 0, 0)),
            png_chunk(b"tRNS", struct.pack(">H", values[0])),
            png_chunk(b"IDAT", zlib.compress(bytes([0, row]))),
            png_chunk(b"IEND", b""),
        ]
    )
    seen = [[value * 255 // most] * 3 for value in values[1:]]
    assert load_image(encoded).tolist() == [[WHITE, *seen]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_colours_under_alpha_zero_never_show(mode):
    hidden = Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    assert (load_image(hidden.convert(mode)) == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_encoded_alpha_is_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    half = Image.new("RGBA", (3, 2), (255, 0, 0, 51))  # a fifth
    np.testing.assert_allclose(load_image(encode(half, kind, **options))[0, 0], [255, 204, 204])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    image.putpalette(RED + BLUE)
    assert load_image(encode(image, kind, transparency=1)).tolist() == [[RED, WHITE]]


@pytest.mark.parametrize(("mode", "hidden"), [("L", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_colour_key_is_white(mode, hidden):
    assert (load_image(encode(Image.new(mode, (3, 2)), transparency=hidden)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_applied_once(kind, orientation):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the upper left quarter is white
    # how a camera held that way stores it: the inverse of what the tag asks for
    store = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(store[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    encoded = encode(stored, kind, exif=exif, **options)
    for source in (encoded, Image.open(io.BytesIO(encoded))):
        np.testing.assert_allclose(load_image(source).astype(int), upright, atol=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_the_picture_upright(kind, caplog):
    encoded = encode(Image.new("RGB", (8, 4)), kind, exif=b"Exif\0\0garbage garbage")
    assert load_image(encoded).shape == (4, 8, 3)
    assert kind == "JPEG" or "EXIF" in caplog.text  # Pillow itself passes over a JPEG's


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientations_do_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert load_image(encode(Image.new("RGB", (8, 4)), "JPEG", exif=exif)).shape == (4, 8, 3)


def test_cmyk_jpeg_becomes_three_colours():
    encoded = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    np.testing.assert_allclose(load_image(encoded)[0, 0], RED, atol=3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV", "CMYK", "RGBX", "I;16B"])
def test_other_modes_become_rgb(mode):
    assert load_image(Image.new(mode, (5, 3))).shape == (3, 5, 3)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_modes_without_a_known_scale_are_refused(mode):
    with pytest.raises(ImageError, match=f"got PIL mode {mode} "):
        load_image(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    encoded = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    np.testing.assert_allclose(load_image(encoded)[0, 0], RED, atol=3)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [13_000, 14_000])
@pytest.mark.filterwarnings("error")
def test_pixel_bombs_are_refused_by_the_header(side, monkeypatch):
    encoded = encode(Image.new("1", (side, side)))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match=f"got {side} x {side} = {side**2} pixels"):
            load_image(encoded)


def test_the_pixel_limit_is_inclusive_and_covers_pil_images():
    assert load_image(Image.new("L", (5, 7)), max_pixels=35).shape == (7, 5, 3)
    with pytest.raises(ImageError, match="at most 34"):
        load_image(Image.new("L", (5, 7)), max_pixels=34)


def test_a_gif_frame_beyond_its_screen_counts_too():
    encoded = bytearray(encode(Image.new("L", (50, 50)), "GIF"))
    encoded[6:10] = struct.pack("<HH", 1, 1)  # the screen's size, not the frame's
    with pytest.raises(ImageError, match="2500 pixels"):
        load_image(bytes(encoded), max_pixels=2499)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("kept", [0.03, 0.5, 0.95])
def test_truncated_files_are_errors(kind, kept):
    encoded = encode(noise(), kind)
    load_image(encoded)
    with pytest.raises(ImageError, match=f"{kind} data that is truncated or damaged"):
        load_image(encoded[: max(20, int(len(encoded) * kept))])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"just some words\n", "plain text"),
        ("文字".encode() * 300, "plain text"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"<?xml version='1.0'?><svg>", "SVG"),
        (b"II*\x00\x08\x00\x00\x00", "TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "PostScript"),
        (b"%PDF-1.7", "PDF"),
        (b"RIFF\x24\x00\x00\x00WAVEfmt ", "unknown kind"),
        (b"\x00\x00\x00\x18ftypheic", "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
        (bytes(range(256)), "unknown kind"),
    ],
)
def test_what_is_no_picture_is_named_for_what_it_is(content, words, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(ImageError, match=words) as caught:
            load_image(source)
        assert "JPEG, PNG, WEBP, GIF, BMP" in str(caught.value)


def test_formats_off_the_list_are_refused():
    with pytest.raises(ImageError, match="TIFF"):
        load_image(encode(noise(), "TIFF"))
    with pytest.raises(ImageError, match="expected JPEG"):
        load_image(encode(noise(), "PPM"))


def test_a_picture_under_a_wrong_name_is_read_all_the_same(tmp_path):
    path = tmp_path / "really-a-jpeg.png"
    path.write_bytes(encode(noise(), "JPEG"))
    assert load_image(path).shape == (23, 31, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("kind", FORMATS)
def test_thin_pictures_are_answered(size, kind):
    image_YXC = load_image(encode(Image.new("RGB", size, "red"), kind))
    assert image_YXC.shape == (size[1], size[0], 3)
    np.testing.assert_allclose(to_square(image_YXC, 28), np.full((28, 28, 3), RED), atol=3)


def test_a_huge_text_chunk_is_answered_or_refused_without_growing():
    encoded = encode(noise())
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 200_000_000))
    with pytest.raises(ImageError, match="PNG"):
        load_image(encoded[:33] + bomb + encoded[33:])


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(FORMATS), st.data())
def test_damage_gives_pixels_or_an_own_message(kind, data):
    encoded = bytearray(encode(noise(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        result = load_image(bytes(encoded), max_pixels=10**6)
    except ImageError as error:
        message = str(error)
    else:
        assert result.dtype == np.uint8
        assert result.ndim == 3
        message = ""
    assert not re.search(r"0x[0-9a-f]{4}|Traceback|BytesIO|/", message)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_give_an_own_message(content):
    with pytest.raises(ImageError) as caught:
        load_image(content)
    assert "0x" not in str(caught.value)


# --- paths --------------------------------------------------------------------------------------


def test_a_missing_file_suggests_near_names(tmp_path):
    (tmp_path / "Cat.JPG").write_bytes(b"")
    (tmp_path / "zebra.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"does not exist; did you mean .*Cat\.JPG") as caught:
        load_image(tmp_path / "cat.jpg")
    assert "zebra" not in str(caught.value)
    with pytest.raises(ImageError, match=r"no file in .* has a name like it"):
        load_image(tmp_path / "quite-another.gif")
    with pytest.raises(ImageError, match="cannot be listed"):
        load_image(tmp_path / "no-folder" / "cat.jpg")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer for ever
    for path, words in ((tmp_path, "got a folder"), (tmp_path / "pipe.png", "device or pipe")):
        with pytest.raises(ImageError, match=words):
            load_image(path)


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png", "x" * 5000, ""])
def test_impossible_paths_are_own_errors(path):
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert len(str(caught.value)) < 500


def test_oversized_files_are_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(load_module, "MAX_BYTES", 100)
    path = tmp_path / "big.png"
    path.write_bytes(encode(noise()))
    for source in (path, path.read_bytes(), data_url(path.read_bytes())):
        with pytest.raises(ImageError, match="bytes, expected at most 100"):
            load_image(source)


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "ftp://a/b.png", "s3://b/k"],
)
def test_other_schemes_are_refused(url):
    with pytest.raises(ImageError, match="this kind of address is not opened"):
        load_image(url, allow_fetch=True)


@pytest.mark.parametrize("url", ["http://a.example/b.png", "HTTPS://a.example/b.png"])
def test_fetching_is_off_by_default(url, monkeypatch):
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(ImageError, match=r"fetching is off.*allow_fetch=True"):
        load_image(url)


# --- data URLs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "data:image/png;base64",
        "DATA:IMAGE/PNG;BASE64",
        "data:image/png;charset=utf-8;base64",
        "data:image/png;name=a.png;base64;x=y",
        "data:image/jpeg;base64",  # mislabelled, as clients do: the bytes decide
        "data: image/png ; base64",
    ],
)
def test_data_url_variants_are_read(header):
    assert load_image(data_url(encode(noise()), header)).shape == (23, 31, 3)


def test_data_url_escapes_and_line_breaks_are_read():
    url = data_url(encode(noise()))
    header, _, payload = url.partition(",")
    escaped = payload.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    folded = "\r\n".join(payload[i : i + 76] for i in range(0, len(payload), 76))
    for variant in (escaped, folded):
        assert load_image(f"{header},{variant}").shape == (23, 31, 3)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64", "not base64"),
        ("data:", "not base64"),
        ("data:text/html;base64,AAAA", "wrong type: got 'text/html'"),
        ("data:;base64,AAAA", "wrong type: got none"),
        ("data:image/svg+xml;base64,AAAA", "wrong type: got 'image/svg"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,%20%0A", "empty"),
        ("data:image/png;base64,@@@@", "base64 is wrong"),
        ("data:image/png;base64,AAAAA", "base64 is wrong"),
        ("data:image/png;base64,AAA", "base64 is wrong"),
        ("data:image/png;base64,AA=A", "base64 is wrong"),
        ("data:image/png;base64,é", "base64 is wrong"),
        ("data:image/png;base64,AAAA", "is not a picture"),
    ],
)
def test_wrong_data_urls_say_what_is_wrong(url, words):
    with pytest.raises(ImageError, match=words):
        load_image(url)


# --- the square ---------------------------------------------------------------------------------


def test_the_square_is_pils_bicubic():
    image = noise()
    for size in (14, 28, 70):
        expected = np.array(image.resize((size, size), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(to_square(np.array(image), size), expected)


def test_the_square_shrinks_with_antialiasing():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = to_square(stripes, 8)[:, 2:-2].astype(int)
    assert abs(inner - 127).max() <= 2  # a filter without antialiasing would give 0 or 255


def test_a_square_of_the_right_size_is_copied_unchanged():
    image_YXC = np.array(noise(28, 28))
    result = to_square(image_YXC, np.int64(28))
    np.testing.assert_array_equal(result, image_YXC)
    assert not np.shares_memory(result, image_YXC)


@pytest.mark.parametrize("size", [0, -14])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(ValueError, match=f"got {size}"):
        to_square(np.zeros((2, 2, 3), np.uint8), size)
    with pytest.raises(TypeError):
        to_square(np.zeros((2, 2, 3), np.uint8), 28.0)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 4), (0, 2, 3)])
def test_wrong_pixels_are_refused(shape):
    with pytest.raises(ValueError, match="expected pixels as uint8"):
        to_square(np.zeros(shape, np.uint8), 28)


def test_an_opened_image_has_the_loaded_pixels_and_gives_the_same_square():
    random = np.random.default_rng(3)
    pixels = random.integers(0, 256, (37, 53, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    opened, loaded = open_image(data.getvalue()), load_image(data.getvalue())
    assert np.array_equal(np.asarray(opened), loaded)
    assert np.array_equal(to_square(opened, 28), to_square(loaded, 28))
    with pytest.raises(ValueError, match="expected an image of mode RGB: got L"):
        to_square(Image.new("L", (5, 5)), 28)
