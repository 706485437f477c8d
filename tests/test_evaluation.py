"""Scoring on held-out scenes: prompts are those of training, and marks say what is right."""

import io
import json
import shlex
import sys
import types

import numpy as np
import pytest

from qwenvl_jax.cli.opening import SHIPPED_MODEL
from qwenvl_jax.data import tasks
from qwenvl_jax.data.sources.scene_rows import scene_example, scene_of
from qwenvl_jax.data.sources.scenes import HELD_OUT_PAIRS, HELD_OUT_WORDS, scene
from qwenvl_jax.evaluation import report
from qwenvl_jax.evaluation.marks import Mark, Score, mean_marks
from qwenvl_jax.evaluation.scenes import (
    FORMS,
    SUBJECTS,
    examination,
    facts,
    marks,
    named_pairs,
    set_paper,
    sit,
    summarise,
)
from qwenvl_jax.evaluation.sheet import Exchange, Sitting, _width, draw_sheet, wrap
from qwenvl_jax.prompt.boxes import format_box
from qwenvl_jax.prompt.tokenizer import load_tokenizer

SIDE = 56
TASK_OF = {"caption": "caption", "question": "vqa", "locate": "ref_grounding", "read": "ocr_vqa"}


@pytest.fixture(scope="module")
def tokenizer():
    """The shipped vocabulary, so that right answers have the length they will have."""
    return load_tokenizer(SHIPPED_MODEL, slots=4)


def right_answer(paper):
    return format_box(paper.box) if paper.subject == "locate" else f" {paper.expected[0]}"


class ModelThatKnows:
    """Stands in for the loaded model: looks answers up by prompt and picture."""

    def __init__(self, tokenizer, papers):
        self.tokenizer = tokenizer
        self.known = {self.key(p.tokens, p.images_IYXC): right_answer(p) for p in papers}
        self.batches = []

    @staticmethod
    def key(tokens, image_IYXC):
        return tuple(tokens), image_IYXC.tobytes()

    def generate_batch(self, tokens, images, *, max_new_tokens, stop_tokens):
        self.batches.append(len(tokens))
        assert self.tokenizer.endoftext_id in stop_tokens
        answers = [self.known[self.key(*row)] for row in zip(tokens, images, strict=True)]
        ids = [self.tokenizer.encode_raw(answer) for answer in answers]
        assert all(len(row) <= max_new_tokens for row in ids), "a right answer must fit"
        return ids


def test_the_same_seed_sets_the_same_papers_and_another_seed_others(tokenizer):
    def shown(seed):
        return [(p.tokens, p.images_IYXC.tobytes()) for p in examination(tokenizer, SIDE, 3, seed)]

    assert shown(1) == shown(1)
    assert not {image for _, image in shown(1)} & {image for _, image in shown(2)}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_task_prompts_open_training_rows(tokenizer, subject):
    """The prompt of a paper is what stands before the loss in a training row of that task."""
    row = scene_example(TASK_OF[subject], 7, "heldout", SIDE, tokenizer)
    first_target = int(np.argmax(row.is_target))
    drawn = scene_of(TASK_OF[subject], 7, "heldout", SIDE)
    paper = set_paper(subject, "task", drawn, tokenizer)
    np.testing.assert_array_equal(paper.images_IYXC[0], row.images[0])
    picture = tokenizer.image_ids()
    assert paper.tokens[: len(picture)] == picture
    if subject == "caption":
        assert paper.tokens == row.ids[:first_target].tolist()
    # What is asked differs by chance; how the prompt ends behind it must not.
    assert paper.tokens[-1] == row.ids[first_target - 1]
    assert tokenizer.decode(paper.tokens).count("<img></img>") == 1


@pytest.mark.parametrize("subject", SUBJECTS)
def test_chat_prompts_are_those_of_chat_training(tokenizer, subject):
    drawn = scene_of(TASK_OF[subject], 7, "heldout", SIDE)
    paper = set_paper(subject, "chat", drawn, tokenizer)
    turn = f"Picture 1: {tasks.PICTURE}\n{paper.asked}"
    row = tasks.chat_example([(turn, "yes")], [paper.scene.image], tokenizer, "row")
    assert row.ids[: len(paper.tokens)].tolist() == paper.tokens
    assert not row.is_target[: len(paper.tokens)].all()
    assert tokenizer.decode(paper.tokens).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_knows_everything_scores_full_marks(tokenizer, form):
    papers = examination(tokenizer, SIDE, 25, seed=3, form=form)
    model = ModelThatKnows(tokenizer, papers)
    done = []
    scores = summarise(papers, sit(model, papers, done.append))
    assert {score.measure for score in scores if score.value != 1.0} == set()
    assert done[-1] == len(papers) == 100
    measures = [score.measure for score in scores]
    assert "locate: IoU at 0.5" in measures
    assert "question: all" in measures
    assert "caption: exact" in measures


def test_a_silent_model_scores_nothing(tokenizer):
    papers = examination(tokenizer, SIDE, 10)
    assert {score.value for score in summarise(papers, [""] * len(papers))} == {0.0}


def test_captions_are_marked_by_what_they_name(tokenizer):
    drawn = (scene(key, "heldout", SIDE, has_writing=False) for key in range(50))
    two_things = next(one for one in drawn if len(one.things) == 2)
    paper = set_paper("caption", "task", two_things, tokenizer)
    first, second = paper.scene.things
    wrong = "ring" if "ring" not in (first.shape, second.shape) else "cross"
    answer = f"a {first.colour} {first.shape} and a {second.colour} {wrong}"
    by_measure = {score.measure: score for score in summarise([paper], [answer])}
    assert by_measure["caption: objects named"].value == 0.5
    assert by_measure["caption: named objects that are there"].value == 0.5
    assert by_measure["caption: exact"].value == 0.0


def test_pairs_are_whole_words():
    assert named_pairs("a red circle, blued squares and a Small green star") == {
        ("circle", "red"),
        ("star", "green"),
    }


@pytest.mark.parametrize(
    ("shift", "hit"), [(0.0, 1.0), (0.3, 1.0), (0.4, 0.0)], ids=["exact", "near", "off"]
)
def test_a_box_hits_from_one_half_overlap(tokenizer, shift, hit):
    """Moving a box by a share s of its width leaves (1 - s) / (1 + s) overlap: one half at 1/3."""
    paper = set_paper("locate", "task", scene(3, "heldout", SIDE, has_writing=False), tokenizer)
    x1, y1, x2, y2 = paper.box
    move = int((x2 - x1) * shift)
    move = move if x2 + move <= 999 else -move
    answer = f"<box>({x2 + move},{y2}),({x1 + move},{y1})</box>"  # corners in any order
    found = {mark.measure: mark.value for mark in marks(paper, answer)}
    assert found["locate: IoU at 0.5"] == hit
    assert found["locate: mean IoU"] == pytest.approx((1 - shift) / (1 + shift), abs=0.02)


def test_new_facts_are_those_training_never_showed(tokenizer):
    papers = examination(tokenizer, SIDE, 60, seed=1)
    for paper in papers:
        if paper.kind == "word":
            assert paper.is_new == (paper.expected[0] in HELD_OUT_WORDS)
        elif paper.is_new:
            shown = {(thing.shape, thing.colour) for thing in paper.scene.things}
            assert (shown | named_pairs(paper.asked)) & HELD_OUT_PAIRS
        elif paper.subject == "locate":
            assert not named_pairs(paper.asked) & HELD_OUT_PAIRS
    assert 0 < sum(paper.is_new for paper in papers) < len(papers) / 2


def test_a_score_counts_new_facts_apart(tokenizer):
    papers = [p for p in examination(tokenizer, SIDE, 60, seed=1) if p.subject == "locate"]
    answers = ["" if paper.is_new else right_answer(paper) for paper in papers]
    new = sum(paper.is_new for paper in papers)
    score = summarise(papers, answers)[0]
    assert 0 < new < len(papers)
    known, share = len(papers) - new, pytest.approx(1 - new / len(papers))
    assert score == Score("locate: IoU at 0.5", share, len(papers), 1.0, known, 0.0, new)


def test_reports_hold_every_score_and_answer(tokenizer, tmp_path):
    papers = examination(tokenizer, SIDE, 2)
    answers = [right_answer(paper) for paper in papers]
    scores = [Score("read: word exact", 0.875, 8, 0.875, 8, None, 0), *summarise(papers, answers)]
    page = report.to_markdown(scores)
    assert "| read: word exact | 87.5 % | 8 | 87.5 % | - | - |" in page.splitlines()
    assert len(page.splitlines()) == len(scores) + 2
    record = report.to_json({"seed": 0}, scores, list(map(facts, papers, answers)))
    paths = report.write(tmp_path / "deep" / "er", "scenes", page, record)
    assert [path.suffix for path in paths] == [".md", ".json"]
    read = json.loads(paths[1].read_text(encoding="utf-8"))
    assert [row["answer"] for row in read["answers"]] == answers
    assert read["scores"][0]["count"] == 8
    table = report.to_table("title", scores)
    assert table.row_count == len(scores)


def test_answers_return_to_their_own_papers(tokenizer):
    """Batches are made by subject and length; each answer must come back in its paper's place."""
    papers = examination(tokenizer, SIDE, 70)[::-1]
    model = ModelThatKnows(tokenizer, papers)
    answers = sit(model, papers)
    assert answers == [right_answer(paper) for paper in papers]
    assert max(model.batches) == 64


def test_the_eval_command_prints_the_table(tokenizer, monkeypatch, capsys, tmp_path):
    from qwenvl_jax.cli import eval as command

    papers = examination(tokenizer, SIDE, 3, seed=5)
    model = ModelThatKnows(tokenizer, papers)
    model.config = types.SimpleNamespace(image_size=SIDE)
    opened = []
    monkeypatch.setattr(command, "open_model", lambda options: opened.append(options) or model)
    argv = ["--num-scenes", "3", "--seed", "5", "--form", "task", "--output", str(tmp_path)]
    assert command.main([*argv, "--tensor", "2"]) == 0
    assert [options.tensor for options in opened] == [2]
    assert "100.0 %" in capsys.readouterr().out
    assert (tmp_path / "scenes_task.md").exists()
    assert json.loads((tmp_path / "scenes_task.json").read_text())["run"]["seed"] == 5


def test_names_that_look_like_markup_are_printed_as_they_are(
    tokenizer, monkeypatch, capsys, tmp_path
):
    from qwenvl_jax.cli import eval as command

    model = ModelThatKnows(tokenizer, examination(tokenizer, SIDE, 3, seed=5))
    model.config = types.SimpleNamespace(image_size=SIDE)
    monkeypatch.setattr(command, "open_model", lambda _: model)
    output = tmp_path / "sc[v1]ores" / "x[" / "y]" / ("long " * 30)
    argv = ["--num-scenes", "3", "--seed", "5", "--form", "task", "--output", str(output)]
    assert command.main([*argv, "--model", "m[v1]"]) == 0
    printed = capsys.readouterr().out
    assert f"\nwrote {output / 'scenes_task.json'}\n" in printed
    assert printed.startswith("m[v1]: task prompts")


def test_names_that_look_like_markup_are_shown_while_one_waits(monkeypatch):
    from qwenvl_jax.cli import eval as command
    from qwenvl_jax.cli.opening import waiting

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in ("stderr", "stdout"):
        monkeypatch.setattr(sys, stream, Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with waiting("loading m[v1]"):
        pass
    assert "loading m[v1]" in sys.stderr.getvalue()
    with command._watch("x[/y]", 3) as on_progress:
        on_progress(3)
    assert "x[/y]" in sys.stdout.getvalue()


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--num-scenes", "0"], "--num-scenes must be positive"), (["--model", "no/such"], "no/such")],
)
def test_wrong_input_is_one_line_and_exit_code_2(argv, message, capsys):
    from qwenvl_jax.cli import eval as command

    assert command.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# --- the sheet and the demo ---------------------------------------------------------------------


def test_lines_are_no_wider_than_asked_and_lose_nothing():
    text = "a small red circle, a blue star and an orange ring with the word TREE"
    lines = wrap(text, 200)
    assert len(lines) > 2
    assert " ".join(lines) == text
    assert wrap("", 200) == [""]


@pytest.mark.parametrize(
    "text", ["unbreakable" * 9, "请用方框标出图中所有的红色圆形和蓝色星形" * 2]
)
def test_a_word_wider_than_a_line_is_cut(text):
    for start in ("", "so it says: "):
        lines = wrap(f"{start}{text} end", 200)
        assert "".join(lines).replace(" ", "") == f"{start}{text}end".replace(" ", "")
        assert len(lines) > 3
        assert max(_width(line) for line in lines) <= 200
        assert lines[0].startswith(start + text[0])


def test_marks_of_which_nobody_says_whether_they_are_new_count_in_the_whole_only():
    marks = [Mark("question: all", 1.0, True), *[Mark("question: all", 0.0, None)] * 3]
    [score] = mean_marks(marks, ["question"])
    assert score == Score("question: all", 0.25, 4, None, 0, 1.0, 1)
    assert score.is_told_apart
    [score] = mean_marks([*marks, Mark("question: all", 0.5, False)], ["question"])
    assert (score.known_value, score.known_count, score.value) == (0.5, 1, 0.3)
    [score] = mean_marks(marks[1:], ["question"])
    assert not score.is_told_apart


def test_the_sheet_draws_boxes_and_grows_with_its_text(tokenizer):
    drawn = scene(3, "heldout", SIDE, has_writing=False)
    paper = set_paper("locate", "chat", drawn, tokenizer)
    right = Exchange(paper.asked, f"<ref>it</ref>{format_box(paper.box)}", True, "")
    plain = draw_sheet("title", [Sitting(drawn.image, [right._replace(answer="it")])])
    boxed = draw_sheet("title", [Sitting(drawn.image, [right])])
    assert plain.size == boxed.size
    assert np.any(np.asarray(plain) != np.asarray(boxed))
    wrong = Exchange(paper.asked, "word " * 500, False, "it")
    longer = draw_sheet("title", [Sitting(drawn.image, [wrong] * 9)])
    assert longer.height > boxed.height
    assert longer.width == boxed.width


@pytest.mark.parametrize("seed", ["-1", "999999999999"])
def test_the_demo_names_a_seed_that_it_cannot_take(seed, capsys):
    from qwenvl_jax.cli import demo

    assert demo.main(["--seed", seed]) == 2
    assert f"--seed must lie in 0 .. {demo.MAX_SEED}: got {seed}" in capsys.readouterr().err


@pytest.mark.parametrize(("knows", "verdict"), [(True, "right"), (False, "wrong")])
def test_the_demo_says_which_answers_are_right(
    knows, verdict, tokenizer, monkeypatch, capsys, tmp_path
):
    from qwenvl_jax.cli import demo

    options = demo.DemoOptions(scenes=3, seed=2)
    vl = types.SimpleNamespace(tokenizer=tokenizer, config=types.SimpleNamespace(image_size=SIDE))
    scenes = list(demo.draw_scenes(options, SIDE))
    assert [one.writing is not None for one in scenes] == [False, False, True]
    papers = [paper for one in scenes for paper in demo.papers_of(one, vl)]
    answers = {p.asked + str(p.scene.image.tobytes()): right_answer(p) for p in papers}
    made = list(demo.collages(options, vl))
    for paper in made:
        answers[demo.question_of(paper) + str(paper.images_IYXC[0].tobytes())] = paper.expected
    assert [(len(p.images_IYXC), p.language) for p in made] == [(2, "en"), (1, "zh")]

    def chat(text, images, temperature, max_new_tokens):
        assert temperature == 0.0
        answer = answers[text + str(images[0].tobytes())] if knows else ""
        return types.SimpleNamespace(text=answer)

    vl.chat = chat
    folder = tmp_path / "my model"
    monkeypatch.setattr(demo, "open_model", lambda _: vl)
    sheet = tmp_path / "demo.png"
    argv = ["--scenes", "3", "--seed", "2", "--output", str(sheet), "--pictures", str(tmp_path)]
    assert demo.main([*argv, "--model", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"({verdict})") == len(papers) + len(made) == 11
    commands = [line for line in printed.splitlines() if line.startswith("python infer.py")]
    assert len(commands) == 11
    for line in commands:
        words = shlex.split(line)[2:]
        assert words[:3] == ["--model", str(folder), "--image"]
        assert words[-3:-1] == ["--temperature", "0"]
    assert sheet.stat().st_size > 0
    assert len(list(tmp_path.glob("scene_*.png"))) == len(list(tmp_path.glob("coll*.png"))) == 3
