"""Scores against the published scripts' own results, and the quirks that those results rest on."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenvl_jax.evaluation import metrics
from qwenvl_jax.evaluation.metrics import (
    anls,
    box_iou,
    exact_match,
    gqa_normalize,
    grounding_iou,
    relaxed_accuracy,
    vqa_overall,
    vqa_score,
)

GOLDEN = json.loads((pathlib.Path(__file__).parent / "golden" / "metrics.json").read_text())


def test_the_public_names_are_there():
    names = {"vqa_score", "anls", "relaxed_accuracy", "gqa_normalize", "box_iou", "cider"}
    assert names <= {name for name in metrics.__all__ if callable(getattr(metrics, name))}


# --- golden cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["vqa"], ids=lambda case: case["prediction"])
def test_golden_vqa(case):
    assert vqa_score(case["prediction"], case["answers"]) == case["score"]


def test_golden_vqa_overall():
    predictions = [case["prediction"] for case in GOLDEN["vqa"]]
    answers = [case["answers"] for case in GOLDEN["vqa"]]
    assert vqa_overall(predictions, answers) == GOLDEN["vqa_overall"]


@pytest.mark.parametrize("case", GOLDEN["anls"], ids=lambda case: case["prediction"])
def test_golden_anls(case):
    assert anls(case["prediction"], case["answers"]) == pytest.approx(case["score"], abs=1e-12)


@pytest.mark.parametrize("case", GOLDEN["relaxed"], ids=lambda case: case["prediction"])
def test_golden_relaxed(case):
    assert relaxed_accuracy(case["prediction"], case["answer"]) == case["score"]
    assert relaxed_accuracy(case["prediction"], [case["answer"]]) == case["score"]


@pytest.mark.parametrize("case", GOLDEN["grounding"], ids=lambda case: case["answer"])
def test_golden_grounding(case):
    iou = grounding_iou(case["answer"], case["gt_box"], height=case["height"], width=case["width"])
    assert iou == case["iou"]


@pytest.mark.parametrize("case", GOLDEN["gqa"], ids=lambda case: case["prediction"])
def test_golden_gqa(case):
    assert gqa_normalize(case["prediction"]) == case["normalized"]


# --- VQA score ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100)])
def test_each_annotator_is_left_out_in_turn(matches, score):
    assert vqa_score("cat", ["cat"] * matches + ["dog"] * (10 - matches)) == score


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("The Cat", "cat"),
        ("a cat\n", "cat"),
        ("two", "2"),
        ("none", "0"),
        ("TEN", "10"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes lost: not in the table
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the entry that works the other way
        ("shed", "shed"),
        ("were", "were"),
        ("left-hand", "left hand"),
        ("left- hand", "left hand"),  # beside a space: deleted
        ("1,000", "1000"),
        ("a,b", "b"),  # the comma becomes a space, and "a" then is an article
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("." * 40 + "x", "." * 8 + "x"),  # the 32 that the misplaced flag allows
    ],
)
def test_how_a_prediction_is_cleaned(prediction, gold):
    assert vqa_score(prediction, [gold] * 10) == 100


def test_answers_lose_punctuation_only_when_they_differ():
    assert vqa_score("U.S.", ["U.S."] * 10) == 0
    assert vqa_score("U.S.", ["U.S."] * 9 + ["no"]) == 0  # and never their capitals
    assert vqa_score("u.s.", ["u.s."] * 9 + ["no"]) == 100


def test_overall_is_the_mean_before_rounding():
    answers = [["cat"] + ["dog"] * 2, ["dog"] * 3]  # 2/9 and 0
    assert vqa_overall(["cat", "cat"], answers) == round(100 * (2 / 3 / 3) / 2, 2)
    with pytest.raises(ValueError, match="got 1 prediction and 2 questions"):
        vqa_overall(["cat"], answers)


# --- text answers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prediction", "answers", "score"),
    [
        ("", [""], 1.0),
        ("", ["x"], 0.0),
        ("ABC", ["abc"], 1.0),
        (" a  b ", ["a b"], 1.0),
        ("ab", ["ac"], 0.5),
        ("abc", ["axx"], 0.0),
        ("ab   ", ["ac"], 0.8),  # divided by the length before spaces are evened out
        ("abcd", ["zzzz", "abcz"], 0.75),
        ("kitten", ["sitting"], 1 - 3 / 7),
    ],
)
def test_anls_by_hand(prediction, answers, score):
    assert anls(prediction, answers) == pytest.approx(score)


@given(st.text(max_size=12), st.text(max_size=12))
def test_anls_is_a_share_and_symmetric(a, b):
    assert 0 <= anls(a, b) <= 1
    assert anls(a, b) == anls(b, a)
    assert anls(a, a) == 1


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("105.2", "100", 1.0),  # 5 % of the prediction, not of the answer
        ("95.3", "100", 1.0),
        ("95.2", "100", 0.0),
        ("0", "0%", 0.0),  # a prediction of zero is compared as text
        ("1", "0", 0.0),
        ("50%", "0.5", 1.0),
        ("-10", "10", 0.0),
        ("inf", "inf", 0.0),
        ("1,000", "1000", 0.0),
        ("é", "É", 1.0),
        ("yes ", "yes", 1.0),
        ("yes", "yes ", 0.0),  # only the prediction is stripped
    ],
)
def test_relaxed_accuracy_by_hand(prediction, answer, score):
    assert relaxed_accuracy(prediction, answer) == score
    assert relaxed_accuracy(prediction, ["other", answer]) == score


def test_exact_match():
    assert exact_match(" Dog ", ["cat", "dog\n"]) == 1.0
    assert exact_match("dogs", "dog") == 0.0


@pytest.mark.parametrize(
    ("answer", "short"),
    [
        ("This is the man", ""),  # "is " twice: only what lies between is kept
        ("a sofa a wall", "sof"),
        ("the sofa near the wall", "wall"),
        ("left of the car", "car"),  # "the " comes before " of"
        ("side of car", "side"),
        ("U.S. flag", "u"),
        ("!", ""),
        ("", ""),
    ],
)
def test_gqa_words_are_found_inside_words(answer, short):
    assert gqa_normalize(answer) == short


@pytest.mark.parametrize("score", [vqa_score, anls, relaxed_accuracy, exact_match])
def test_no_gold_answer_is_an_error(score):
    with pytest.raises(ValueError, match="no gold answer"):
        score("cat", [])


# --- boxes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "iou"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_box_iou_by_hand(a, b, iou):
    assert box_iou(a, b) == pytest.approx(iou)
    assert box_iou(b, a) == box_iou(a, b)


@given(st.lists(st.floats(0, 1000, width=32), min_size=8, max_size=8))
def test_box_iou_is_a_share(numbers):
    x1, x2, x3, x4 = sorted(numbers[:2]) + sorted(numbers[2:4])
    y1, y2, y3, y4 = sorted(numbers[4:6]) + sorted(numbers[6:])
    assert 0 <= box_iou((x1, y1, x2, y2), (x3, y3, x4, y4)) <= 1.001


def test_a_box_must_be_four_numbers():
    with pytest.raises(ValueError, match="four numbers"):
        box_iou((0, 0, 1), (0, 0, 1, 1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "answer",
    ["", "(1e999,0),(1,1)", "(nan,0),(1,1)", "(1e300,-1e300),(1,1)", "(,),(,)", "(1,2),(3)"],
)
def test_any_answer_has_an_overlap(answer):
    assert grounding_iou(answer, (0, 0, 5, 5), height=10, width=10) == 0.0
