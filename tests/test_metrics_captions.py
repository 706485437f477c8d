"""Caption scores against the COCO toolkit's: tokens, CIDEr, BLEU, ROUGE-L."""

import json
import math
import pathlib
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenvl_jax.evaluation import captions, metrics, ptb

FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "captions.json").read_text())
# Generated captions and the official program's tokens for them, punctuation dropped.
TOKENS = json.loads((FOLDER / "ptb_tokens.json").read_text())


def test_golden_tokens():
    tokens = ptb.tokenize(list(GOLDEN["predictions"].values()))
    assert [" ".join(row) for row in tokens] == list(GOLDEN["tokenized_predictions"].values())


def test_the_official_programs_tokens():
    tokens = ptb.tokenize(TOKENS["captions"])
    wrong = [
        (caption, " ".join(row), expected)
        for caption, row, expected in zip(TOKENS["captions"], tokens, TOKENS["tokens"], strict=True)
        if " ".join(row) != expected
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog, a cat; and \"two\" 'birds'...", "a dog a cat and two birds"),
        ("It's the dogs' ball, isn't it?", "it 's the dogs ball is n't it"),
        ("cannot gonna 'twas", "can not gon na 't was"),
        ("(three) [four] {five}", "-lrb- three -rrb- -lsb- four -rsb- -lcb- five -rcb-"),
        ("U.S. a.m. St. etc. snow.", "u.s. a.m. st. etc. snow"),
        ("black-and-white T-shirt and/or 1,000", "black-and-white t-shirt and/or 1,000"),
        ("$5 50% #1 £3", "$ 5 50 % # 1 # 3"),
        ("plan b. The end", "plan b the end"),
        ("plan b. the end", "plan b. the end"),
        ("plan b. The! end", "plan b. the end"),
        ("wow!! really?!", "wow !! really ?!"),
        ("it’s a café – “good”", "it 's a café good"),
        ("😀 ok", "ok"),
        ("", ""),
    ],
)
def test_tokens_by_hand(caption, tokens):
    assert ptb.tokenize([caption]) == [tokens.split()]


def test_the_next_caption_decides_about_a_full_stop():
    assert ptb.tokenize(["house no.", "5 dogs"])[0] == ["house", "no."]
    assert ptb.tokenize(["house no.", "dogs"])[0] == ["house", "no"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=30), max_size=4))
def test_every_text_has_tokens_of_its_own(texts):
    rows = ptb.tokenize(texts)
    assert len(rows) == len(texts)
    assert not any(token in ptb.PUNCTUATION or " " in token for row in rows for token in row)


# --- scores -------------------------------------------------------------------------------------


def test_golden_scores():
    scores = captions.score_captions(GOLDEN["predictions"], GOLDEN["references"])
    assert scores.cider == pytest.approx(GOLDEN["cider"], abs=1e-12)
    assert scores.cider_per_image == pytest.approx(GOLDEN["cider_per_image"], abs=1e-12)
    assert scores.bleu == pytest.approx(GOLDEN["bleu"], abs=1e-12)
    assert scores.rouge_l == pytest.approx(GOLDEN["rouge_l"], abs=1e-12)
    assert scores.tokenizer == "own"


def test_lists_and_mappings_in_any_order_score_the_same():
    predictions, references = GOLDEN["predictions"], GOLDEN["references"]
    backwards = dict(reversed(references.items()))
    assert metrics.cider(predictions, backwards) == pytest.approx(GOLDEN["cider"], abs=1e-12)
    lists = [predictions[key] for key in references], list(references.values())
    assert metrics.cider(*lists) == pytest.approx(GOLDEN["cider"], abs=1e-12)


def test_cider_by_hand():
    # each caption equals its only reference and shares no word with the other
    per_image = captions.score_captions(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert per_image.cider_per_image == pytest.approx([10, 10])
    # one word of one: a cosine of 1 for n = 1, and no pairs on either side
    single = captions.score_captions(["a", "b"], [["a"], ["b"]])
    assert single.cider_per_image == pytest.approx([2.5, 2.5])
    # twice the caption: clipping keeps the weights of the reference, the norm doubles
    doubled = captions.score_captions(["a . a", "b"], [["a"], ["b"]]).cider_per_image[0]
    assert doubled == pytest.approx(2.5 / 2 * math.exp(-1 / 72))


def test_words_of_every_picture_weigh_nothing():
    assert metrics.cider(["a cat"], [["a cat"]]) == 0.0
    assert metrics.cider(["a", "a"], [["a"], ["a"]]) == 0.0


def test_empty_captions_score_zero():
    scores = captions.score_captions(["", "!"], [["a cat"], ["a dog"]])
    assert (scores.cider, scores.rouge_l) == (0.0, 0.0)
    assert scores.bleu == pytest.approx([0] * 4, abs=1e-3)


def test_short_captions_pay_in_bleu():
    scores = captions.score_captions(["a cat"], [["a cat on the mat", "a dog is on the mat"]])
    assert scores.bleu[0] == pytest.approx(math.exp(1 - 5 / 2), rel=1e-6)


def test_rouge_takes_precision_and_recall_from_different_references():
    # precision 1 from the long reference, recall 1 from the short one
    scores = captions.score_captions(["a b c"], [["x a b c y z", "b"]])
    assert scores.rouge_l == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("predictions", "references", "words"),
    [
        ([], [], "got 0 captions"),
        (["a"], [["a"], ["b"]], "got 1 caption and 2 lists"),
        (["a"], [[]], "references of caption 0"),
        (["a"], ["a"], "expected a list"),
        ({"1": "a"}, {"2": ["a"]}, "2 are in one of them only"),
        ({"1": "a"}, [["a"]], "both be lists or both be mappings"),
    ],
)
def test_unpaired_captions_are_errors(predictions, references, words):
    with pytest.raises(ValueError, match=words):
        metrics.cider(predictions, references)


# --- the official program -----------------------------------------------------------------------


def fake_program(folder: pathlib.Path, monkeypatch, script: str) -> None:
    """A package with a jar, and a `java` that is this shell script."""
    (folder / "pycocoevalcap" / "tokenizer").mkdir(parents=True)
    (folder / "pycocoevalcap" / "__init__.py").touch()
    (folder / "pycocoevalcap" / "tokenizer" / "program.jar").touch()
    java = folder / "java"
    java.write_text("#!/bin/sh\n" + script)
    java.chmod(java.stat().st_mode | stat.S_IXUSR)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def test_the_official_programs_answer_is_used_and_named(tmp_path, monkeypatch):
    # what it must be told, and lines that only it would give
    fake_program(
        tmp_path,
        monkeypatch,
        'case "$*" in *program.jar*PTBTokenizer*-preserveLines*-lowerCase*) ;; *) exit 3;; esac\n'
        'while read -r line; do echo "java $line ."; done\n',
    )
    scores = captions.score_captions(["a\nb", "c"], [["x"], ["c"]], tokenizer="java")
    assert scores.tokenizer == "java"
    assert scores.rouge_l > captions.score_captions(["a\nb", "c"], [["x"], ["c"]]).rouge_l
    assert captions.java_tokenize(["a\nb", "é"]) == [["java", "a", "b"], ["java", "é"]]


def test_a_failing_program_is_an_error(tmp_path, monkeypatch):
    fake_program(tmp_path, monkeypatch, "echo broken >&2; exit 1\n")
    with pytest.raises(RuntimeError, match="failed: broken"):
        captions.java_tokenize(["a"])


def test_a_missing_program_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RuntimeError, match=r'needs Java and .*tokenizer="own"'):
        metrics.cider(["a"], [["a"]], tokenizer="java")
