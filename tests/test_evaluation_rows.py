"""Scoring on rows: prompts are those of training, and marks follow from what the row says."""

import io
import json
import tempfile
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.cli import eval as command
from qwenvl_jax.cli.opening import SHIPPED_MODEL
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sources.collages import Collages
from qwenvl_jax.data.sources.documents import Documents
from qwenvl_jax.data.sources.page_photo import PageSettings
from qwenvl_jax.data.tasks import PICTURE, example_of
from qwenvl_jax.evaluation import report
from qwenvl_jax.evaluation.rows import (
    f1,
    row_marks,
    row_paper,
    row_papers,
    sit_rows,
    split_by_length,
    summarise_rows,
)
from qwenvl_jax.prompt.boxes import parse_boxes
from qwenvl_jax.prompt.tokenizer import load_tokenizer

SIDE = 56
ONE, OTHER, FAR = (0, 0, 400, 400), (500, 500, 900, 900), (600, 0, 999, 300)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED_MODEL, slots=4)


def picture():
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 40, 40)).save(data, "PNG")
    return data.getvalue()


def record(task, **fields):
    return Record(f"{task}/1", task, {"language": "en", **fields}, (picture(),))


def marked(row, answer, tokenizer):
    paper = row_paper(row, tokenizer, SIDE)
    return {mark.measure: mark.value for mark in row_marks(paper, answer)}


def boxes(*places):
    return "".join(f"<box>({a},{b}),({c},{d})</box>" for a, b, c, d in places)


def test_letters_are_right_in_all_cells_or_not(tokenizer):
    row = record("letters", firsts="C.A.", seconds="...T")
    (measure,) = marked(row, "C.A.", tokenizer)
    assert measure == "letters of all cells: exact, en"
    assert marked(row, "C.A.", tokenizer) == {measure: 1.0}
    assert marked(row, "C.O.", tokenizer) == {measure: 0.0}


class ModelThatKnows:
    """Stands in for the loaded model: looks answers up by prompt and pictures."""

    def __init__(self, tokenizer, papers):
        self.tokenizer = tokenizer
        decoder = types.SimpleNamespace(max_positions=2048)
        self.config = types.SimpleNamespace(image_size=SIDE, decoder=decoder)
        self.known = {(tuple(p.tokens), p.images_IYXC.tobytes()): p.expected for p in papers}

    def generate_batch(self, tokens, images, *, max_new_tokens, stop_tokens):
        longest = max(len(ids) for ids in tokens) + max_new_tokens
        assert longest <= self.config.decoder.max_positions
        assert {self.tokenizer.endoftext_id, self.tokenizer.im_end_id} == set(stop_tokens)
        answers = [
            self.known[tuple(ids), shown.tobytes()]
            for ids, shown in zip(tokens, images, strict=True)
        ]
        ids = [self.tokenizer.encode_raw(answer) for answer in answers]
        assert all(len(row) <= max_new_tokens for row in ids), "a right answer must fit"
        return ids


SOURCES = {
    "collages": Collages(400, "heldout", side=64),
    "documents": Documents(
        60, "heldout", page=PageSettings(short_side=(112, 112), aspect=(1.0, 1.0), max_lines=2)
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_that_knows_everything_scores_full_marks(name, tokenizer):
    papers = row_papers(SOURCES[name], 60, tokenizer, SIDE, seed=2)
    done = []
    scores = summarise_rows(
        papers, sit_rows(ModelThatKnows(tokenizer, papers), papers, done.append)
    )
    assert {score.measure: score.value for score in scores if score.value != 1.0} == {}
    assert done[-1] == len(papers) == 60
    assert {score.measure.rpartition(", ")[2] for score in scores} == {"en", "zh"}
    assert {score.value for score in summarise_rows(papers, [""] * 60)} == {0.0}


def test_new_objects_count_apart(tokenizer):
    papers = row_papers(SOURCES["collages"], 60, tokenizer, SIDE)
    answers = ["" if paper.is_new else paper.expected for paper in papers]
    scores = summarise_rows(papers, answers)
    assert sum(score.new_count for score in scores) > 10
    assert {score.new_value for score in scores} <= {0.0, None}
    for score in scores:
        assert score.value == pytest.approx(1 - score.new_count / score.count)


def test_rows_that_do_not_say_what_training_had_have_one_score(tokenizer):
    plain = row_paper(record("vqa", question="How many?", answer="3"), tokenizer, SIDE)
    seen = row_paper(record("vqa", question="?", answer="3", objects="seen"), tokenizer, SIDE)
    assert plain.is_new is None
    page = report.to_markdown(summarise_rows([plain, plain], ["3", "4"]))
    assert page == (
        "| measure | score | items |\n| --- | ---: | ---: |\n| question: exact, en | 50.0 % | 2 |\n"
    )
    assert len(report.to_table("title", summarise_rows([plain], ["3"])).columns) == 3
    page = report.to_markdown(summarise_rows([plain, seen], ["3", "4"]))
    assert "| question: exact, en | 50.0 % | 2 | 0.0 % | - | - |" in page  # of `plain` nobody says


def test_the_prompt_is_what_training_shows_before_the_answer(tokenizer):
    row = record("vqa", question="How many?", answer="3")
    paper = row_paper(row, tokenizer, SIDE)
    ids = example_of(row, tokenizer).ids.tolist()
    assert ids == [*paper.tokens, *tokenizer.encode(" 3"), tokenizer.endoftext_id]
    turns = [("user", f"Picture 1: {PICTURE}\nWhat?"), ("assistant", "A dog.")]
    turns += [("user", "And?"), ("assistant", "A cat.")]
    said = [{"from": role, "value": text} for role, text in turns]
    paper = row_paper(record("chat", conversations=said), tokenizer, SIDE)
    assert paper.expected == "A dog."
    assert paper.asked.endswith("<|im_start|>assistant\n")
    assert paper.images_IYXC.shape == (1, SIDE, SIDE, 3)


def test_two_pictures_are_a_subject_of_their_own(tokenizer):
    marks = f"Picture 1: {PICTURE}\nPicture 2: {PICTURE}\nWhich has more dogs?"
    said = [{"from": "user", "value": marks}, {"from": "assistant", "value": "Picture 2"}]
    row = Record("k", "chat", {"conversations": said, "language": "zh"}, (picture(), picture()))
    assert marked(row, " Picture 2 ", tokenizer) == {"two pictures in chat: exact, zh": 1.0}
    assert marked(row, "Picture 1", tokenizer) == {"two pictures in chat: exact, zh": 0.0}
    assert row_paper(row, tokenizer, SIDE).images_IYXC.shape == (2, SIDE, SIDE, 3)


def test_one_place_is_hit_or_missed_by_the_first_box(tokenizer):
    row, name = record("ref_grounding", phrase="dog", boxes=[ONE]), "phrase located: IoU at 0.5, en"
    assert marked(row, boxes(ONE), tokenizer) == {name: 1.0}
    assert marked(row, boxes((0, 0, 400, 300)), tokenizer) == {name: 1.0}
    assert marked(row, boxes((400, 300, 0, 0)), tokenizer) == {name: 1.0}  # any order of corners
    assert marked(row, boxes((0, 0, 400, 190)), tokenizer) == {name: 0.0}
    assert marked(row, boxes(FAR, ONE), tokenizer) == {name: 0.0}
    assert marked(row, "nowhere", tokenizer) == {name: 0.0}


def test_several_places_earn_their_f1(tokenizer):
    row = record("ref_grounding", phrase="dogs", boxes=[ONE, OTHER])
    name = "phrase located: box F1 at 0.5, en"
    assert marked(row, boxes(OTHER, ONE), tokenizer) == {name: 1.0}
    assert marked(row, boxes(ONE), tokenizer) == {name: pytest.approx(2 / 3)}
    assert marked(row, boxes(ONE, ONE, FAR), tokenizer) == {name: pytest.approx(2 / 5)}


def test_a_phrase_needs_its_words_and_its_box(tokenizer):
    row = record("grounded_caption", phrases=[["a dog", [ONE]], [" and"], [" a cat", [OTHER]]])
    row.fields["phrases"][1].append([])
    name = "caption with boxes: phrase-box F1 at 0.5, en"
    dog, cat = f"<ref> a dog</ref>{boxes(ONE)}", f"<ref> a cat</ref>{boxes(OTHER)}"
    assert marked(row, f"{dog} and{cat}", tokenizer) == {name: 1.0}
    assert marked(row, f"{dog} and<ref> a cow</ref>{boxes(OTHER)}", tokenizer) == {name: 0.5}
    assert marked(row, f"{dog} and<ref> a cat</ref>{boxes(FAR)}", tokenizer) == {name: 0.5}
    alone = record("grounded_caption", phrases=[["a dog", [ONE]]])
    assert marked(alone, f"<ref> a cat</ref>{boxes(ONE)}", tokenizer) == {name: 0.0}


def test_lines_are_read_whatever_their_places(tokenizer):
    quad = [[0, 0], [9, 0], [9, 9], [0, 9]]
    row = record("ocr", lines=[["Vienna", quad], ["at dawn", quad]])
    answer = "<ref>Vienna</ref><quad>(1,1),(2,2),(3,3),(4,4)</quad><ref>at down</ref>"
    found = marked(row, answer, tokenizer)
    assert found["all lines: ANLS, en"] == pytest.approx(1 - 1 / len("Vienna at dawn"))
    assert found["all lines: lines exact, en"] == 0.0
    read = marked(record("ocr_vqa", question="?", answer="Vienna"), "Vienne", tokenizer)
    assert read["reading: ANLS, en"] == pytest.approx(5 / 6)


def test_the_best_overlaps_are_paired_first():
    wanted = parse_boxes(boxes((0, 0, 100, 100), (0, 40, 100, 140)))
    found = parse_boxes(boxes((0, 20, 100, 120), (0, 0, 100, 99)))
    assert f1(found, wanted, has_phrases=False) == 1.0


def test_a_row_without_an_answer_is_refused(tokenizer):
    row = record("chat", conversations=[{"from": "user", "value": f"{PICTURE} hello"}])
    with pytest.raises(DataError, match="has no answer"):
        row_paper(row, tokenizer, SIDE)
    assert row_paper(Record("t", "text", {"text": "words"}), tokenizer, SIDE) is None


def test_the_command_scores_each_path_and_keeps_the_answers(
    tokenizer, monkeypatch, capsys, tmp_path
):
    from qwenvl_jax.data.sources import open as opening

    monkeypatch.setattr(opening, "open_source", lambda path: SOURCES["collages"])
    papers = row_papers(SOURCES["collages"], 8, tokenizer, SIDE, seed=4)
    monkeypatch.setattr(command, "open_model", lambda _: ModelThatKnows(tokenizer, papers))
    argv = ["--rows", "made", "--num-rows", "8", "--seed", "4", "--output", str(tmp_path)]
    assert command.main(argv) == 0
    assert "100.0 %" in capsys.readouterr().out
    record = json.loads((tmp_path / "rows_made.json").read_text())
    assert [answer["key"] for answer in record["answers"]] == [paper.key for paper in papers]
    assert record["run"]["rows"] == "made"
    assert np.mean([a["answer"] == a["expected"] for a in record["answers"]]) == 1.0


class Rows(list):
    fingerprint = "made"


def test_rows_that_cannot_be_used_are_left_out_and_told(tokenizer, monkeypatch, capsys, tmp_path):
    from qwenvl_jax.data.sources import open as opening

    good = [record("vqa", question=f"How many? {k}", answer="3") for k in range(3)]
    bad = record("chat", conversations=[{"from": "user", "value": f"{PICTURE} hello"}])
    rows = Rows([good[0], *[bad] * 5, *good[1:]])
    model = ModelThatKnows(tokenizer, row_papers(Rows(good), 3, tokenizer, SIDE))
    monkeypatch.setattr(opening, "open_source", lambda path: rows)
    monkeypatch.setattr(command, "open_model", lambda _: model)
    assert command.main(["--rows", "made", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.count("made: a row is left out: row ") == 3
    assert "has no answer" in told
    assert "made: and 2 more that cannot be used" in told
    assert len(json.loads((tmp_path / "rows_made.json").read_text())["answers"]) == 3
    rows[:] = [bad]
    assert command.main(["--rows", "made"]) == 2
    assert "and 1 that cannot be used; name other rows" in capsys.readouterr().err


def test_rows_too_long_for_the_model_are_left_out_by_name(tokenizer, monkeypatch, capsys, tmp_path):
    from qwenvl_jax.data.sources import open as opening

    rows = [record("vqa", question="How many? " * k, answer="3") for k in (1, 2, 99)]
    rows = Rows(row._replace(key=f"row/{k}") for k, row in enumerate(rows))
    papers = row_papers(rows, 3, tokenizer, SIDE)
    fitting, too_long = split_by_length(papers, tokenizer, 120)
    assert {paper.key for paper in fitting} == {"row/0", "row/1"}
    assert [paper.key for paper in too_long] == ["row/2"]
    exact = len(too_long[0].tokens) + 32
    assert split_by_length(papers, tokenizer, exact)[1] == []
    assert len(split_by_length(papers, tokenizer, exact - 1)[1]) == 1

    model = ModelThatKnows(tokenizer, papers)
    model.config.decoder.max_positions = 120
    monkeypatch.setattr(opening, "open_source", lambda path: rows)
    monkeypatch.setattr(command, "open_model", lambda _: model)
    argv = ["--rows", "made", "--output", str(tmp_path)]
    assert command.main(argv) == 0
    told = capsys.readouterr().err
    assert "made: 1 of 3 rows left out" in told
    assert "the model's 120 positions: row/2" in told
    assert len(json.loads((tmp_path / "rows_made.json").read_text())["answers"]) == 2
    model.config.decoder.max_positions = 8
    assert command.main(argv) == 2
    assert "3 of them longer than the model's 8 positions" in capsys.readouterr().err


def test_results_of_paths_that_end_alike_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("en/heldout", "zh/heldout", "food/1.0.0", "scenes/1.0.0", "pages", "zh/x"):
        (tmp_path / folder).mkdir(parents=True)
    paths = [Path(name) for name in ("en/heldout", "zh/heldout", "food/1.0.0", "scenes/1.0.0")]
    files = [Path(name) for name in ("a/x.json", "pages/x.json", "zh/x", "pages.json", "pages")]
    assert command.row_names([*paths, *files]) == [
        *("en_heldout", "zh_heldout", "food_1.0.0", "scenes_1.0.0"),
        *("a_x", "pages_x", "zh_x", "pages.json", "pages"),
    ]
    assert command.row_names([Path("food/1.0.0"), Path("en/rows.v2.jsonl")]) == ["1.0.0", "rows.v2"]


def test_what_is_wrong_with_paths_is_found_before_the_model_is_loaded(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "open_model", lambda _: pytest.fail("loaded the model"))
    chats = tmp_path / "a.json"
    said = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Yes"}]
    chats.write_text(json.dumps([{"id": "1", "conversations": said}]))

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    for argv, message in (
        (["--rows", "a.json", "nowhere"], "no data at 'nowhere'"),
        (["--rows", "a.json", "./a.json"], "--rows names 'a.json' more than once"),
        (["--output", "a.json"], "--output is no folder: got the file 'a.json'"),
        (["--output", "a.json/scores"], "--output is no folder: got the file 'a.json'"),
        (["--output", "full"], "the folder cannot be written to: got 'full', No space left"),
        (["--seed", "-1"], "--seed must lie in 0 .. 2**63 - 1: got -1"),
    ):
        assert command.main(argv) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--num-rows", "3"], "--num-rows has no effect without --rows"),
        (["--rows", "a", "--form", "chat"], "--form has no effect with --rows"),
        (["--rows", "a", "--num-rows", "0"], "--num-rows must be positive: got 0"),
    ],
)
def test_settings_without_effect_are_refused(argv, message, capsys):
    assert command.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "answer", "language"),
    [
        ("图里有什么？", "一个图形。", "zh"),
        ("What is it?", "A dog.", "en"),
        ("有几个？", "3", "zh"),
    ],
)
def test_the_language_of_a_row_that_names_none_is_that_of_its_words(
    tokenizer, question, answer, language
):
    said = [{"from": "user", "value": f"Picture 1: {PICTURE}\n{question}"}]
    said += [{"from": "assistant", "value": answer}]
    for task, fields in (
        ("chat", {"conversations": said}),
        ("vqa", {"question": question, "answer": answer}),
    ):
        row = Record(f"{task}/1", task, fields, (picture(),))
        assert row_paper(row, tokenizer, SIDE).language == language
    named = record("vqa", question=question, answer=answer, language="fr")
    assert row_paper(named, tokenizer, SIDE).language == "fr"
