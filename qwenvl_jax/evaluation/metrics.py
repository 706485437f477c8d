"""Benchmark scores exactly as the published evaluation scripts compute them, quirks included.

A figure is comparable with a published one only if it is computed the same way, so nothing here is
repaired: what looks wrong and is kept says so under `Quirks:`. Captions (CIDEr, BLEU, ROUGE-L) are
scored in `captions`; `cider` is offered here with the others.
"""

import re
from collections.abc import Sequence

import numpy as np

from qwenvl_jax.evaluation.captions import cider
from qwenvl_jax.words import counted

__all__ = [
    "anls",
    "box_iou",
    "cider",
    "exact_match",
    "gqa_normalize",
    "grounding_iou",
    "relaxed_accuracy",
    "vqa_overall",
    "vqa_score",
]

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")
# `re.sub` of the script is given a flag where a count belongs; the flag's value is 32
MAX_FULL_STOPS = 32
ARTICLES = ("a", "an", "the")
NUMBER_WORDS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}

# An answer that lost one apostrophe of these gets it back. The script's table has gaps ("she'd"
# and "we'll" are missing, being words without it) and one entry that works the other way.
CONTRACTION_STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "n't've": "could had might should would",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you y'all",
    "'ll": "how it somebody someone something they what who why you y'all",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could might must not should they we what where who would you",
    "": "ma'am o'clock 'twas y'all 'ow's'at",
}
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    form[:at] + form[at + 1 :]: form
    for ending, stems in CONTRACTION_STEMS.items()
    for form in (stem + ending for stem in stems.split())
    for at in range(len(form))
    if form[at] == "'"
}

Box = Sequence | np.ndarray  # x1, y1, x2, y2

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05

BOX_TEXT = re.compile(r"\((.*?)\),\((.*?)\)")
BOX_SCALE = 999  # the coordinate that means the right or lower edge


# --- VQA score ----------------------------------------------------------------------------------


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """Percent, rounded to two decimals, of one prediction against its (ten) annotators' answers.

    Each annotator in turn is left out; the prediction scores min(1, matches among the others / 3).

    >>> vqa_score("7", ["7"] * 3 + ["9"] * 7)
    90.0

    Quirks: the prediction loses case, articles, number words and punctuation, but the answers only
      punctuation, and not even that when all are equal: "the cat" ten times is out of reach.

    Source: released `eval_mm/vqa_eval.py`; paper, evaluation of general VQA.
    """
    return round(100 * _vqa_accuracy(prediction, answers), 2)


def vqa_overall(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Percent, rounded to two decimals, over questions; the mean of unrounded scores."""
    pairs = _pairs(predictions, answers)
    return round(100 * sum(_vqa_accuracy(p, a) for p, a in pairs) / len(pairs), 2)


def _vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    answers = _answers(answers)
    answer = _vqa_words(_vqa_punctuation(prediction.replace("\n", " ").replace("\t", " ").strip()))
    if len(set(answers)) > 1:
        answers = [_vqa_punctuation(gold) for gold in answers]
    matches = sum(gold == answer for gold in answers)
    scores = [min(1, float(matches - (gold == answer)) / 3) for gold in answers]
    return float(sum(scores)) / len(scores)


def _vqa_punctuation(text: str) -> str:
    result = text
    is_grouped_number = DIGIT_COMMA_DIGIT.search(text) is not None
    for mark in PUNCTUATION:
        # a mark beside a space is deleted everywhere, as seen in the text before any deletion
        is_beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if is_beside_space or is_grouped_number else " ")
    return FULL_STOP.sub("", result, count=MAX_FULL_STOPS)


def _vqa_words(text: str) -> str:
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


# --- text answers -------------------------------------------------------------------------------


def anls(prediction: str, answers: Sequence[str] | str) -> float:
    """One minus the smallest normalised edit distance to an answer, in 0..1; 0 below one half.

    >>> anls("Total: 12", ["total: 13", "12"])
    0.8888888888888888

    Quirks: distances are between texts whose case and runs of spaces are evened out, but are
      divided by the longer length before that.

    Source: released `eval_mm/infographicsvqa_eval.py` (DocVQA, InfographicVQA).
    """
    distances = []
    for answer in _answers(answers):
        length = max(len(answer.upper()), len(prediction.upper()))
        distance = _edit_distance(_even(answer), _even(prediction))
        distances.append(distance / length if length else 0.0)
    score = 1 - min(distances)
    return 0.0 if score < ANLS_THRESHOLD else float(score)


def _even(text: str) -> str:
    return " ".join(text.lower().split())


def _edit_distance(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, letter_a in enumerate(a, start=1):
        above, row = row, [i]
        for j, letter_b in enumerate(b, start=1):
            replaced = above[j - 1] + (letter_a != letter_b)
            row.append(min(replaced, above[j] + 1, row[j - 1] + 1))
    return row[-1]


def relaxed_accuracy(prediction: str, answers: Sequence[str] | str) -> float:
    """1.0 if the prediction is within 5 % of an answer (numbers) or equals it but for case, or 0.0.

    >>> relaxed_accuracy("10%", "0.1"), relaxed_accuracy("104.9", "100")
    (1.0, 1.0)

    Quirks: the script swaps its arguments, so the 5 % are of the prediction, not of the answer,
      and a prediction of zero is compared as text.

    Source: released `eval_mm/evaluate_vqa.py` (ChartQA).
    """
    text = prediction.strip()
    return max(float(_is_close(text, answer)) for answer in _answers(answers))


def _is_close(prediction: str, answer: str) -> bool:
    predicted, expected = _number(prediction), _number(answer)
    if predicted and expected is not None:
        return abs(expected - predicted) / abs(predicted) <= RELAXED_TOLERANCE
    return prediction.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def exact_match(prediction: str, answers: Sequence[str] | str) -> float:
    """1.0 if the prediction equals an answer but for case and outer spaces, or 0.0.

    Source: released `eval_mm/evaluate_vqa.py` (AI2D, OCR-VQA, and GQA after `gqa_normalize`).
    """
    text = prediction.strip().lower()
    return float(any(text == answer.strip().lower() for answer in _answers(answers)))


def gqa_normalize(answer: str) -> str:
    """The short answer inside a sentence, lower-case, to be compared by `exact_match`.

    >>> gqa_normalize("It is a dog.")
    'dog'

    Quirks: the words are found as parts of words too, and what follows their second occurrence is
      lost: "this is the man" gives "".

    Source: released `eval_mm/evaluate_vqa.py` (GQA).
    """
    text = answer.strip()
    for mark in ".,!":
        text = text.partition(mark)[0]
    text = text.lower()
    for word in ("is ", "are ", "a ", "an ", "the "):
        if word in text:
            text = text.split(word)[1]
    return text.partition(" of")[0].strip()


# --- boxes --------------------------------------------------------------------------------------


def grounding_iou(answer: str, gold_box: Box, *, height: int, width: int) -> float:
    """Overlap, in 0..1, of the first box in an answer with the gold box (x1, y1, x2, y2 in pixels).

    A prediction counts as right from 0.5 on. Text without a box that can be read counts as the box
    (0, 0, 0, 0).

    Source: released `eval_mm/evaluate_grounding.py`.
    """
    with np.errstate(over="ignore"):  # a model may write any number
        box = np.array(_first_box(answer)).astype(np.float32) / np.float32(BOX_SCALE)
        return box_iou(box * np.array([width, height] * 2, np.float32), gold_box)


def _first_box(answer: str) -> tuple[float, ...]:
    found = BOX_TEXT.search(answer)
    points = [group.split(",") for group in found.groups()] if found else []
    if [len(point) for point in points] != [2, 2]:
        return (0.0, 0.0, 0.0, 0.0)
    try:
        return tuple(float(number) for point in points for number in point)
    except ValueError:
        return (0.0, 0.0, 0.0, 0.0)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union, in 0..1, of two boxes x1, y1, x2, y2 in the same unit.

    >>> box_iou((0, 0, 2, 2), (1, 0, 3, 2))
    0.3333333432674408

    Computed in float32, as published. A box whose corners are swapped overlaps with nothing.

    Differs: two boxes without area give 0.0, not NaN; both count as wrong.

    Source: released `eval_mm/evaluate_grounding.py`.
    """
    # float32 throughout: near one half, where right and wrong part, the last bit decides
    first, second = np.asarray(a, np.float32), np.asarray(b, np.float32)
    if first.shape != (4,) or second.shape != (4,):
        raise ValueError(
            f"a box is four numbers x1, y1, x2, y2: got shapes {first.shape} and {second.shape}"
        )
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
        inner = np.prod(np.maximum(sides, np.float32(0)))
        union = np.prod(first[2:] - first[:2]) + np.prod(second[2:] - second[:2]) - inner
        iou = inner / union
    return float(iou) if np.isfinite(iou) else 0.0


# --- what every score checks --------------------------------------------------------------------


def _answers(answers: Sequence[str] | str) -> list[str]:
    golds = [answers] if isinstance(answers, str) else list(answers)
    if not golds:
        raise ValueError("a question has no gold answer: got an empty list, expected at least one")
    return golds


def _pairs(predictions: Sequence, answers: Sequence) -> list[tuple]:
    if len(predictions) != len(answers) or not predictions:
        raise ValueError(
            f"each prediction needs its answers: got "
            f"{counted(len(predictions), 'prediction')} and {counted(len(answers), 'question')}"
        )
    return list(zip(predictions, answers, strict=True))
