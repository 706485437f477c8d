"""Drawn pictures, looked at pixel by pixel, and labels on machines with and without fonts."""

import importlib.util
import io
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_jax.image import load_image
from qwenvl_jax.prompt import draw, fonts
from qwenvl_jax.prompt.boxes import parse_boxes
from qwenvl_jax.prompt.draw import draw_boxes

GREY = (90, 90, 90)


def grey(height: int = 300, width: int = 400) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


@pytest.fixture
def no_machine_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "_installed", tuple)


@pytest.fixture
def no_shipped_font(monkeypatch):
    monkeypatch.setattr(fonts, "SHIPPED_FONT", "/nowhere.ttf")


@pytest.fixture
def accent_font(monkeypatch) -> str:
    """Makes the machine own one font, with accents and without Chinese: matplotlib's."""
    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None, "matplotlib is missing: install the test extra"
    assert spec.origin is not None
    path = str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf")
    monkeypatch.setattr(fonts, "_installed", lambda: (path,))
    return path


def test_a_box_is_drawn_where_its_coordinates_say():
    image = grey()
    drawn = pixels(draw_boxes(image, [{"ref": None, "box": (250, 250, 750, 750)}]))
    colour = draw._PALETTE[0]
    x1, x2, y1, y2 = (round(v) for v in (399 * 250 / 999, 399 * 750 / 999, 75 - 0.2, 224.5))
    for y, x in ((y1, 200), (y2, 200), (150, x1), (150, x2)):
        assert tuple(drawn[y, x]) == colour
    assert tuple(drawn[150, 200]) == GREY, "the inside is not painted"
    assert tuple(drawn[y1 - 4, 200]) == GREY
    assert (image == GREY).all(), "the input stays as it was"


def test_a_quad_follows_its_corners():
    quad = ((500, 100), (900, 500), (500, 900), (100, 500))
    drawn = pixels(draw_boxes(grey(401, 401), [{"ref": None, "quad": quad}]))
    colour = np.array(draw._PALETTE[0])
    for y, x in ((120, 280), (280, 280), (280, 120), (120, 120)):  # middles of the four sides
        window = drawn[y - 2 : y + 3, x - 2 : x + 3]
        assert (window == colour).all(-1).any()
    assert tuple(drawn[200, 200]) == GREY
    assert tuple(drawn[60, 60]) == GREY


def test_one_phrase_has_one_colour_and_two_have_two():
    text = (
        "<ref>dog</ref><box>(100,300),(200,500)</box><box>(300,300),(400,500)</box>"
        "<ref>cat</ref><box>(600,300),(700,500)</box>"
    )
    drawn = pixels(draw_boxes(grey(1000, 1000), parse_boxes(text, inherit_ref=True)))
    left_sides = [tuple(drawn[450, x]) for x in (101, 301, 601)]
    assert left_sides[0] == left_sides[1] == draw._PALETTE[0]
    assert left_sides[2] == draw._PALETTE[1]


def test_lines_grow_with_the_picture():
    def thickness(side: int) -> int:
        item = {"ref": None, "box": (300, 300, 800, 800)}
        row = pixels(draw_boxes(grey(side, side), [item]))[side // 2, : side // 2]
        return int((row == draw._PALETTE[0]).all(-1).sum())

    assert thickness(1200) > thickness(400) >= 2


@pytest.mark.parametrize(
    "box", [(0, 0, 999, 999), (0, 0, 30, 30), (960, 960, 999, 999), (990, 0, 999, 5)]
)
def test_a_label_stays_whole_inside_the_picture(box, monkeypatch, no_machine_fonts):
    spots = []
    real = draw._draw_label

    def spy(canvas, label, anchor, colour, taken):
        real(canvas, label, anchor, colour, taken)
        spots.extend(taken)

    monkeypatch.setattr(draw, "_draw_label", spy)
    label = "a very long description of something " * 9
    drawn = pixels(draw_boxes(grey(), [{"ref": label, "box": box}]))
    assert len(spots) == 1
    x1, y1, x2, y2 = spots[0]
    assert x1 >= 0
    assert y1 >= 0
    assert x2 <= 400
    assert y2 <= 300
    inside = drawn[y1:y2, x1:x2].reshape(-1, 3)
    assert (inside == draw._PALETTE[0]).all(-1).mean() > 0.3, "background"
    assert (inside == 255).all(-1).any(), "ink"


def test_labels_avoid_each_other():
    items = [{"ref": f"thing {i}", "box": (300, 300, 700, 700)} for i in range(3)]
    drawn = pixels(draw_boxes(grey(), items))
    for colour in draw._PALETTE[:3]:
        # Three equal boxes hide each other's lines; each label's background can still be seen.
        assert (drawn == colour).all(-1).sum() > 200


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.tuples(*[st.integers(-2000, 3000)] * 4))),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_any_place_and_label_can_be_drawn_on_any_size(places, height, width):
    items = [{"ref": ref, "box": box} for ref, box in places]
    assert draw_boxes(grey(height, width), items).size == (width, height)


def test_work_is_bounded_and_the_rest_is_noted():
    items = [{"ref": str(i % 9), "box": (i % 900, 0, 999, 999)} for i in range(50_000)]
    started = time.process_time()
    drawn = pixels(draw_boxes(grey(), items))
    assert time.process_time() - started < 20
    assert (drawn[285:, :150] == draw._BACKGROUND).all(-1).any(), "the note in the corner"
    plain = pixels(draw_boxes(grey(), items[: draw.MAX_BOXES]))
    assert not (plain[285:, :150] == draw._BACKGROUND).all(-1).any()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_pil_pictures_of_every_mode(mode):
    image = Image.new(mode, (50, 40))
    before = image.tobytes()
    drawn = draw_boxes(image, [{"ref": None, "box": (0, 0, 999, 999)}])
    assert drawn.mode == "RGB"
    # Two pixels thick, on the far edge too.
    assert [drawn.getpixel((x, 20)) for x in (0, 1, 48, 49)] == [draw._PALETTE[0]] * 4
    assert image.tobytes() == before


def as_shown() -> dict[str, Image.Image]:
    turned = Image.fromarray(
        np.arange(48 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(48, 32, 3)
    )
    turned.getexif()[0x0112] = 6
    faint = Image.new("RGBA", (48, 32), (255, 0, 0, 51))
    deep = Image.fromarray(np.full((32, 48), 257 * 200, np.uint16))
    palette = Image.new("P", (48, 32))
    palette.info["transparency"] = 0
    return {"turned": turned, "faint": faint, "deep": deep, "palette": palette}


@pytest.mark.parametrize("name", ["turned", "faint", "deep", "palette"])
def test_pil_pictures_are_drawn_on_as_the_model_saw_them(name):
    image = as_shown()[name]
    seen = load_image(image)
    assert seen.shape == (32, 48, 3)
    np.testing.assert_array_equal(np.asarray(draw_boxes(image, [])), seen)
    box = [{"ref": None, "box": (0, 0, 500, 300)}]
    assert draw_boxes(image, box).tobytes() == draw_boxes(seen, box).tobytes()


def test_what_a_file_says_of_its_turn_is_not_passed_on():
    turned, file = as_shown()["turned"], io.BytesIO()
    turned.save(file, "PNG", exif=turned.getexif())
    drawn = draw_boxes(Image.open(file), [])
    assert drawn.size == (32, 48)[::-1]
    assert not drawn.getexif()


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(ValueError, match=r"must be uint8\[Y, X, 3\]: got float32\[4, 4, 3\]"):
        draw_boxes(np.zeros((4, 4, 3), np.float32), [])
    with pytest.raises(ValueError, match=r"needs a box or a quad: got keys \['ref'\]"):
        draw_boxes(grey(), [{"ref": "x"}])


# --- fonts --------------------------------------------------------------------------------------


def test_ascii_needs_no_machine_font(monkeypatch):
    monkeypatch.setattr(fonts, "_installed", lambda: pytest.fail("asked the machine"))
    assert fonts.font_for("a dog, 2 cats", 14)[1] == "a dog, 2 cats"


def test_chinese_needs_no_machine_font(no_machine_fonts):
    font, text = fonts.font_for("两只狗 and a cat", 14)
    assert text == "两只狗 and a cat"
    assert font.path == fonts.SHIPPED_FONT


def test_without_fonts_accents_are_dropped_and_chinese_is_visible(
    no_machine_fonts, no_shipped_font
):
    assert fonts.font_for("Café 两只狗 ok", 14)[1] == "Cafe ??? ok"


def test_a_machine_font_is_used_for_what_others_lack(accent_font, no_shipped_font):
    font, text = fonts.font_for("Café Жук 狗", 14)
    assert text == "Café Жук ?"
    assert font.path == accent_font


def test_machine_fonts_are_looked_for_without_failing(monkeypatch):
    monkeypatch.setattr(fonts, "_CHINESE_PATHS", ())
    monkeypatch.setattr(fonts, "_LATIN_PATHS", ("/nowhere.ttf",))
    monkeypatch.setattr(fonts.shutil, "which", lambda name: None)
    fonts._installed.cache_clear()
    assert fonts._installed() == ()
    fonts._installed.cache_clear()


def test_a_damaged_font_file_is_passed_over(tmp_path, monkeypatch, no_shipped_font):
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"not a font")
    monkeypatch.setattr(fonts, "_installed", lambda: (str(broken),))
    assert fonts.font_for("é狗", 14)[1] == "e?"
