"""Boxes in text: parsing that never raises, writing, pixels; and the list format around them."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwenvl_jax.prompt import boxes
from qwenvl_jax.prompt.boxes import parse_boxes, strip_boxes
from qwenvl_jax.prompt.list_format import from_list_format, to_list_format

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8")
)["boxes"]

TAGS = [f"<{slash}{kind}>" for kind in ("ref", "box", "quad", "img") for slash in ("", "/")]
TAGGY = st.lists(
    st.sampled_from([*TAGS, "(1,2)", ",", "(", ")", "999", "<", " "]) | st.text(max_size=5)
).map("".join)
COORDINATE = st.integers(0, 999)
SIDE = st.integers(1, 20_000)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda c: c["text"][:20])
def test_boxes_equal_the_published_ones(case):
    expected = [{"ref": b.get("ref"), "box": tuple(b["box"])} for b in case["boxes"]]
    assert parse_boxes(case["text"]) == expected


def test_quads_parse_with_their_phrase():
    text = "<ref> OPEN</ref><quad>(568,121), (625,131), (624,182), (567,172)</quad>"
    corners = ((568, 121), (625, 131), (624, 182), (567, 172))
    assert parse_boxes(text) == [{"ref": "OPEN", "quad": corners}]


@pytest.mark.parametrize(
    ("body", "box"),
    [
        ("( 1 , 2 ) , ( 3 , 4 )", (1, 2, 3, 4)),
        ("(1,2)(3,4)", (1, 2, 3, 4)),
        ("（1，2），（3，4）", (1, 2, 3, 4)),
        ("(1.6,2.),(3,4)", (2, 2, 3, 4)),
        ("(300,400),(100,200)", (300, 400, 100, 200)),
        ("(-5,0),(1200,999)", (-5, 0, 1200, 999)),
        ("(1,2),(3,4),(5,6)", None),
        ("(1,2)", None),
        ("(a,b),(c,d)", None),
        ("(1,2),(3,)", None),
        ("", None),
        ("(²,1),(2,3)", None),
        (f"({'9' * 5000},2),(3,4)", None),
    ],
)
def test_imperfect_boxes(body, box):
    expected = [] if box is None else [{"ref": None, "box": box}]
    assert parse_boxes(f"<box>{body}</box>") == expected


def test_a_box_after_an_unclosed_tag_is_found():
    assert [b["box"] for b in parse_boxes("<ref>a <box>(1,2),(3,4)</box><box>(5,6),(7")] == [
        (1, 2, 3, 4)
    ]
    assert len(parse_boxes("<img>lost <ref>a</ref><box>(1,2),(3,4)</box>")) == 1
    assert parse_boxes("<img>x<box>(1,2),(3,4)</box></img>") == []


def test_a_phrase_is_shared_only_when_asked():
    text = "<ref>cups</ref> <box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and <box>(0,0),(9,9)</box>"
    assert [b["ref"] for b in parse_boxes(text)] == ["cups", None, None]
    assert [b["ref"] for b in parse_boxes(text, inherit_ref=True)] == ["cups", "cups", None]


@given(TAGGY)
@example("<ref><box>")
@example("<img><img></img>")
def test_parsing_is_total_and_the_list_format_loses_nothing(text):
    for item in parse_boxes(text):
        assert len(item.get("box", item.get("quad"))) == 4
    strip_boxes(text)
    elements = to_list_format(text)
    if not any("image" in element for element in elements):
        assert from_list_format(elements) == text


@pytest.mark.parametrize(
    "text",
    [
        "<ref>a</ref><box>(1,2),(3,4)</box>" * 20_000,
        "<ref>" * 100_000,
        "</img>" + "<img>" * 100_000,
        "<box>" + "(1,2)," * 100_000 + "</box>",
        "<box>" + ") " * 100_000 + "</box>",
        "<box>" + " " * 100_000 + "</box>",
        "<box>1" * 50_000,
    ],
    ids=["boxes", "refs", "images", "points", "brackets", "spaces", "unclosed"],
)
def test_long_answers_take_linear_time(text):
    started = time.process_time()
    found = parse_boxes(text)
    strip_boxes(text)
    assert len(found) == (20_000 if "</ref>" in text else 0)
    assert time.process_time() - started < 10  # quadratic work would take minutes


def test_strip_leaves_plain_text():
    text = "<ref> Woman</ref><box>(451,379),(731,806)</box> and<ref> her dog</ref><quad>x</quad>."
    assert strip_boxes(text) == "Woman and her dog."
    assert strip_boxes("a dog<box>(12,3") == "a dog"
    assert strip_boxes("a dog<box>(12,3),(4,5)</bo") == "a dog"
    assert strip_boxes("a </ref>b") == "a b"


# --- writing ------------------------------------------------------------------------------------


@given(st.tuples(COORDINATE, COORDINATE, COORDINATE, COORDINATE))
def test_written_places_parse_back(box):
    text = boxes.format_ref("the dog") + boxes.format_box(box)
    assert parse_boxes(text) == [{"ref": "the dog", "box": box}]
    quad = ((box[0], box[1]), (box[2], box[1]), (box[2], box[3]), (box[0], box[3]))
    assert parse_boxes(boxes.format_quad(quad)) == [{"ref": None, "quad": quad}]


def test_places_that_are_not_coordinates_are_refused():
    with pytest.raises(ValueError, match=r"must lie in 0\.\.999.*box_from_pixels"):
        boxes.format_box((0, 0, 1000, 5))
    with pytest.raises(ValueError, match="box needs 4 whole numbers"):
        boxes.format_box((0, 0.5, 10, 5))
    with pytest.raises(ValueError, match="quad needs 8 whole numbers"):
        boxes.format_quad([(0, 0), (1, 1), (2, 2)])
    with pytest.raises(ValueError, match="must not hold"):
        boxes.format_ref("a</ref>")


def test_list_format_writes_quads_lone_phrases_and_continued_numbers():
    quad = [(1, 2), (3, 4), (5, 6), (7, 8)]
    elements = [{"ref": "sign", "quad": [quad]}, {"ref": "dog"}, {"box": np.array([1, 2, 3, 4])}]
    text = from_list_format([*elements, {"image": "b.png"}], first_picture=3)
    assert text == (
        "<ref>sign</ref><quad>(1,2),(3,4),(5,6),(7,8)</quad><ref>dog</ref>"
        "<box>(1,2),(3,4)</box>Picture 3: <img>b.png</img>\n"
    )
    with pytest.raises(ValueError, match=r"needs one of image.*\['video'\]"):
        from_list_format([{"video": "x"}])
    with pytest.raises(ValueError, match="needs 4 coordinates"):
        from_list_format([{"box": (1, 2, 3)}])


def test_list_format_takes_texts_and_refuses_what_is_no_whole_number():
    written = "<box>(1,2),(3,4)</box><box>(5,6),(7,8)</box>"
    for places in (
        ["(1,2),(3,4)", "(5,6),(7,8)"],
        [(1, 2, 3, 4), "(5,6),(7,8)"],
        [1.0, "2", 3, 4, [5, 6], np.float32(7), 8],
    ):
        assert from_list_format([{"box": places}]) == written
    for wrong in (0.1, "half", float("nan"), None):
        with pytest.raises(ValueError, match="must be a whole number: got"):
            from_list_format([{"box": (wrong, 2, 3, 4)}])


# --- pixels -------------------------------------------------------------------------------------


@given(COORDINATE, SIDE)
def test_coordinates_survive_pixels(n, side):
    assert boxes.coordinate_from_pixel(boxes.pixel_from_coordinate(n, side), side) == n


@given(st.floats(0, 1), SIDE)
def test_pixels_survive_coordinates_to_a_thousandth(part, side):
    pixel = part * side
    back = boxes.pixel_from_coordinate(boxes.coordinate_from_pixel(pixel, side), side)
    assert abs(back - pixel) <= side / 1000 * (1 + 1e-9)
    assert 0 <= back <= side


def test_the_rule_for_pixels():
    assert [boxes.coordinate_from_pixel(x, 1000) for x in (0.9, 500.7, 1000)] == [0, 500, 999]
    assert boxes.box_from_pixels((0, 0, 640, 480), 640, 480) == (0, 0, 999, 999)
    assert boxes.box_from_pixels((320, 240, 64, 48), 640, 480) == (100, 100, 500, 500)
    assert boxes.box_from_pixels((-9, 0, 700, 1), 640, 480) == (0, 0, 999, 2)
    assert boxes.box_to_pixels((999, 0, 0, 999), 640, 480) == (0, 0, 640, 480)
    assert boxes.box_to_pixels((-7, 0, 1500, 10**9), 640, 480) == (0, 0, 640, 480)
    quad = ((0, 0), (999, 0), (999, 999), (0, 999))
    corners = boxes.quad_to_pixels(quad, 640, 480)
    assert corners == [(0, 0), (640, 0), (640, 480), (0, 480)]
    assert boxes.quad_from_pixels(corners, 640, 480) == quad


@pytest.mark.parametrize(
    ("pixel", "side"), [(1, 0), (1, -3), (float("nan"), 9), (1, float("inf")), (1, 1e306)]
)
def test_impossible_pixels_are_refused(pixel, side):
    with pytest.raises(ValueError, match="finite pixel and a positive side"):
        boxes.coordinate_from_pixel(pixel, side)


def test_numbers_too_large_for_a_coordinate_are_refused():
    assert boxes.coordinate_from_pixel(1e306, 9) == 999
    with pytest.raises(ValueError, match="too large for a coordinate"):
        boxes.coordinate_from_pixel(10**400, 9)
    with pytest.raises(ValueError, match="too large for a coordinate"):
        boxes.box_text((1, 2, 10**400, 4))
