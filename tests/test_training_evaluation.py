"""Looking at a run while it trains: held-out losses, answers on a page, and nothing disturbed."""

import dataclasses
import json
from types import SimpleNamespace

import fault_run
import jax
import numpy as np
import pytest
from finetune_rows import NANO, write_rows
from PIL import Image

from qwenvl_jax.checkpoint.store import restore_weights
from qwenvl_jax.config import CheckpointConfig, ConfigError, EvaluationConfig
from qwenvl_jax.data.example import DataError, Example
from qwenvl_jax.evaluation.glance import AnswerPage, agrees, choose, exchange
from qwenvl_jax.evaluation.questions import as_question
from qwenvl_jax.prompt.tokenizer import load_tokenizer
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training import heldout
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.heldout import HeldOutLoss, held_out
from qwenvl_jax.training.loop import train
from qwenvl_jax.training.run import Run
from qwenvl_jax.training.state import make_layout, random_weights

STEPS = 5
TASKS = {"caption": 1.0, "ref_grounding": 1.0, "vqa": 1.0}


def config_of(run_dir, **evaluation):
    config = fault_run.get_config()
    data = dataclasses.replace(config.data, tasks=TASKS, rows=4)
    return dataclasses.replace(
        config,
        run_dir=str(run_dir),
        steps=STEPS,
        data=data,
        evaluation=EvaluationConfig(**evaluation),
        checkpoint=CheckpointConfig(every_steps=3, keep=9),
    )


def lines(run_dir, name="metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def go(config) -> dict[str, np.ndarray]:
    """Returns the weights after training."""
    train(config, open_page=AnswerPage, devices=jax.devices()[:1])
    layout = make_layout(config, make_mesh())
    return restore_weights(config.run_dir, layout.abstract.trainable | layout.abstract.frozen)


@pytest.mark.timeout(900)
def test_a_run_that_is_looked_at_is_the_same_run(tmp_path, capsys, monkeypatch):
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    expected = go(config_of(plain))
    assert not (plain / "evaluations.jsonl").exists()
    looks = {"every_steps": 2, "batches": 2, "samples": 3, "max_new_tokens": 5}
    found = go(config_of(seen, **looks))
    out = capsys.readouterr().out
    told = "every 2 steps: loss of 2 held-out batches of 4 rows, 3 answers to samples with one"
    assert f"{told} picture drawn in {seen}" in out
    assert out.endswith(f"try it: qwenvl chat --model {seen}\n")
    assert [r["loss"] for r in lines(seen)] == [r["loss"] for r in lines(plain)]
    for path, array in expected.items():
        np.testing.assert_array_equal(array, found[path], err_msg=path)

    evaluations = lines(seen, "evaluations.jsonl")
    assert [e["step"] for e in evaluations] == [2, 4, STEPS]
    for e in evaluations:
        tasks = [name.removeprefix("loss/") for name in e if name.startswith("loss/")]
        assert set(tasks) == set(TASKS)
        joined = sum(e[f"loss/{task}"] * e[f"scored_tokens/{task}"] for task in tasks)
        assert joined / e["scored_tokens"] == pytest.approx(e["loss"], rel=1e-5)
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    page = Image.open(seen / "samples" / f"{STEPS}.png")
    assert page.height > 3 * 360  # three pictures under each other
    assert f"answers in {seen / 'samples' / '2.png'}" in out

    # An evaluation that a stop has prevented is made by the next start.
    path = seen / "evaluations.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    go(config_of(seen, **looks))
    assert lines(seen, "evaluations.jsonl") == evaluations
    assert "nothing to do" not in capsys.readouterr().out
    go(config_of(seen, **looks))
    assert "nothing to do: this run is finished" in capsys.readouterr().out

    # Going on from step 3 makes the later evaluations again, alike; data that fail are survived.
    for step in (4, STEPS):
        for path in sorted((seen / "checkpoints" / str(step)).rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
    (seen / "checkpoints" / str(STEPS)).rmdir()
    go(config_of(seen, **looks))
    assert lines(seen, "evaluations.jsonl") == evaluations

    def broken(*_, **__):
        raise DataError("the held-out rows are gone")

    monkeypatch.setattr(heldout, "batches", broken)
    go(dataclasses.replace(config_of(seen, **looks), steps=STEPS + 1, allow_change=("steps",)))
    assert "NOT EVALUATED (step 6): the held-out rows are gone; training goes on" in (
        capsys.readouterr().out
    )
    assert lines(seen)[-1]["step"] == STEPS + 1


@pytest.mark.parametrize("what", ["role", "box", "picture"])
def test_bad_held_out_rows_are_told_before_the_run_begins(what, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_rows(tmp_path, 9, "held.json")
    rows = json.loads((tmp_path / "held.json").read_text())
    if what == "role":
        rows[1]["conversations"][0]["from"] = "human"
    if what == "box":
        rows[1]["conversations"][1]["value"] = "<box>(9,9),(1,1)</box>"
    if what == "picture":
        for picture in tmp_path.glob("*.png"):
            picture.write_bytes(b"<html>")
    (tmp_path / "held.json").write_text(json.dumps(rows))
    config = config_of(tmp_path / "run", every_steps=2, samples=0, path=path)
    good = write_rows(tmp_path, 2, "good.json", first=20)
    data = dataclasses.replace(config.data, source="rows", tasks={}, path=good, length=160)
    config = dataclasses.replace(config, data=data)
    with pytest.raises(
        DataError, match=r"^--evaluation\.path: too many samples are bad: "
    ) as caught:
        train(config, devices=jax.devices()[:1])
    assert "quarantine" not in str(caught.value)
    lost = dataclasses.replace(config.evaluation, path="nowhere.json")
    with pytest.raises(DataError, match=r"^--evaluation\.path: no data at 'nowhere.*the path$"):
        train(dataclasses.replace(config, evaluation=lost), devices=jax.devices()[:1])
    assert not (tmp_path / "run").exists()


# --- parts ----------------------------------------------------------------------------------------


def test_held_out_data_are_never_those_trained_on(tmp_path):
    config = config_of(tmp_path, every_steps=1)
    held = held_out(dataclasses.replace(config, micro_batches=2))
    assert (held.split, held.data.rows) == ("heldout", 2)
    with pytest.raises(ConfigError, match=r"evaluation\.path has no effect: got 'more\.json'"):
        held_out(config_of(tmp_path, every_steps=1, path="more.json"))
    rows = dataclasses.replace(config.data, source="rows", tasks={}, path="my.json")
    config = dataclasses.replace(config, data=rows)
    with pytest.raises(ConfigError, match=r"evaluation\.path is empty: .*every_steps=0"):
        held_out(config)
    more = EvaluationConfig(every_steps=1, path="more.json")
    held = held_out(dataclasses.replace(config, evaluation=more))
    assert (held.split, held.data.path) == ("train", "more.json")
    same = EvaluationConfig(every_steps=1, path="./my.json")
    with pytest.raises(
        ConfigError, match=r"evaluation\.path is what the run trains on: got '\./my"
    ):
        held_out(dataclasses.replace(config, evaluation=same))


def test_a_stop_does_not_wait_for_an_evaluation(tmp_path):
    config = config_of(tmp_path, every_steps=1)
    layout = make_layout(config, make_mesh(devices=jax.devices()[:1]))
    asked = iter([False, True])
    with jax.set_mesh(layout.mesh):
        weights = random_weights(config, layout)
        assert HeldOutLoss(config, layout)(weights, lambda: next(asked)) is None

    told = []
    run = SimpleNamespace(
        look=lambda weights, unless: None,
        state=SimpleNamespace(trainable={}, frozen={}),
        goodput=Goodput(),
        report=SimpleNamespace(say=told.append),
        _looked_at=None,
    )
    Run.evaluate(run, 3, lambda: True)  # type: ignore[arg-type]
    assert told == ["NOT EVALUATED (step 3): the next start does it"]
    assert run._looked_at is None


def test_settings_without_evaluations_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation has no effect: .*batches=9"):
        train(config_of(tmp_path, batches=9), devices=jax.devices()[:1])


def test_samples_of_all_tasks_take_turns(tmp_path):
    config = config_of(tmp_path, every_steps=1, samples=6)
    page = AnswerPage(config, make_layout(config, make_mesh()))
    tasks = [asked.example.task for asked in page._asked]
    assert sorted(tasks) == sorted([*TASKS, *TASKS])
    assert len(set(tasks[:3])) == 3
    again = AnswerPage(config, make_layout(config, make_mesh()))
    assert [a.example.key for a in again._asked] == [a.example.key for a in page._asked]
    assert all("heldout" in asked.example.key for asked in page._asked)


def test_rows_are_asked_up_to_their_first_answer(tmp_path):
    config = config_of(tmp_path, every_steps=1, path=write_rows(tmp_path, 12))
    rows = dataclasses.replace(config.data, source="rows", tasks={}, path="unused", length=160)
    config = dataclasses.replace(config, data=rows)
    page = AnswerPage(config, make_layout(config, make_mesh()))
    assert page._asked
    tok = load_tokenizer(NANO, config.model.adapter.num_queries)
    shown = exchange(page._asked[0], page._asked[0].question.answer, tok)
    assert shown.is_right
    assert "<" not in shown.asked + shown.expected
    assert "system" not in shown.asked


def example(ids, is_target) -> Example:
    return Example(np.array(ids, np.int32), np.array(is_target, bool), (), "vqa", "k")


def test_the_question_ends_where_the_answer_begins():
    tok = load_tokenizer(NANO, 16)
    asked = as_question(example([5, 6, 7, tok.endoftext_id, 9], [0, 0, 1, 1, 0]), tok)
    assert asked is not None
    assert (asked.prompt.tolist(), asked.answer) == ([5, 6], [7])
    assert as_question(example([5, 6], [1, 1]), tok) is None
    assert as_question(example([5, 6], [0, 0]), tok) is None
    assert choose(iter([example([5, 6], [0, 1])]), fault_run.get_config(), tok) == []


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("<ref>a dog</ref><box>(10,10),(52,48)</box>", True),
        ("<ref>a cat</ref><box>(10,10),(52,48)</box>", False),
        ("<ref>a dog</ref><box>(40,40),(90,90)</box>", False),
        ("<ref>a dog</ref>", False),
        ("", False),
    ],
)
def test_an_answer_agrees_in_words_and_places(answer, is_right):
    assert agrees(answer, "<ref>a dog</ref><box>(10,10),(50,50)</box>") == is_right
