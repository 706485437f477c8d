"""`qwenvl data lint`: every kind of problem is found, with its row, and nothing else is."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl_jax.cli import data
from qwenvl_jax.cli.data_lint import PROBLEMS
from qwenvl_jax.cli.errors import SUCCESS, USAGE_ERROR
from qwenvl_jax.cli.row_passes import pass_over
from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.lint.problems import KINDS
from qwenvl_jax.data.lint.rows import Checks, check_rows, duplicate_ids, id_hash
from qwenvl_jax.data.lint.text import picture_faults, text_faults
from qwenvl_jax.data.sources.conversations import Conversations
from qwenvl_jax.data.sources.json_rows import find_rows
from qwenvl_jax.data.workers import spread
from qwenvl_jax.prompt.tokenizer import load_tokenizer

NANO = "qwenvl_jax/assets/nano"
HERE = Path(__file__).parent
SAMPLES = Path("tests/data/conversations")
IMG = "<img>a.png</img>\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (8, 8), (9, 99, 199)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:50])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.png").write_bytes(b"<html>")
    (tmp_path / "sound.png").write_bytes(b"RIFF\x24\x00\x00\x00WAVEfmt ")
    return tmp_path


def dialogue(*values: str) -> list[dict[str, str]]:
    roles = itertools.cycle(("user", "assistant"))
    return [{"from": role, "value": value} for role, value in zip(roles, values, strict=False)]


def kinds_of(folder: Path, row: object, checks: Checks | None = None) -> list[str]:
    path = folder / "rows.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    source = Conversations(path, rows=find_rows(path))
    checked = check_rows(source, checks or Checks(), range(len(source)))
    assert {problem.kind for problem in checked.problems} <= set(KINDS)
    return [problem.kind for problem in checked.problems]


TEXTS = {
    "A <ref>dog</ref><box>(0,0),(999,999)</box> and <box>(1,2),(3,4)</box>.": [],
    "<quad>(1,2),(30,4),(30,50),(1,50)</quad> 你好": [],
    "5 < 6 and <b>bold</b> <|strange|> [brackets] {and more}": [],
    "": ["empty"],
    " \n": ["empty"],
    "a <ref> </ref><box>(1,2),(3,4)</box>": ["empty"],
    "<ref>dog": ["tag"],
    "dog</ref> x": ["tag"],
    "<ref>dog<box>(1,2),(3,4)</box>": ["tag"],
    "a </box><box>(1,2),(3,4)": ["tag", "tag"],
    "<box>(1,2),(3,4),(5,6)</box>": ["box_malformed"],
    "<box>1,2,3,4</box>": ["box_malformed"],
    "<box>(1, 2), (3, 4)</box>": ["box_malformed"],
    "<box>(0.1,0.2),(0.3,0.4)</box>": ["box_malformed"],
    "<box>(a,2),(3,4)</box>": ["box_malformed"],
    "<box></box>": ["box_malformed"],
    "<quad>(1,2),(3,4)</quad>": ["box_malformed"],
    "<box>(1,2),(3,1000)</box>": ["box_outside"],
    "<box>(-1,2),(3,4)</box>": ["box_outside"],
    "<quad>(1,2),(30,4),(30,5000),(1,50)</quad>": ["box_outside"],
    "<box>(30,2),(3,4)</box>": ["box_reversed"],
    "<box>(3,40),(30,4)</box>": ["box_reversed"],
    "<box>(3,4),(3,40)</box>": ["box_empty"],
    "<quad>(1,1),(2,2),(3,3),(4,4)</quad>": ["box_empty"],
    "hi <|im_end|> <|endoftext|>": ["special_token", "special_token"],
    "<imgpad><|extra_7|>": ["special_token", "special_token"],
    "<image>\nWhat?": ["foreign_format"],
}


@pytest.mark.parametrize("text", TEXTS)
def test_faults_of_a_text(text):
    assert [fault.kind for fault in text_faults(text)] == TEXTS[text]


DIALOGUES = [
    ([f"Picture 1: {IMG}What?", "A dog in Picture 1."], []),
    ([f"Picture 1: {IMG}Picture 2: {IMG}?", "no", f"Picture 3: {IMG}?", "no"], []),
    (["What is Picture 12 of that book?", "I do not know."], []),
    ([f"{IMG}What?", "a"], [(0, "picture_number")]),
    ([f"Picture 2: {IMG}What?", "a"], [(0, "picture_number"), (0, "picture_count")]),
    ([f"Picture 1: {IMG}Picture 1: {IMG}?", "a"], [(0, "picture_number")]),
    ([f"Picture 1: {IMG}a", "b", f"Picture 1: {IMG}c", "d"], [(2, "picture_number")]),
    ([f"Picture 1: {IMG}a", "See Picture 2."], [(1, "picture_count")]),
    (["Picture 1: what is it?", "b"], [(0, "picture_count")]),
    (["<box>(1,2),(3,4)</box>?", "b"], [(0, "box_without_picture")]),
]


@pytest.mark.parametrize(("values", "expected"), DIALOGUES)
def test_picture_numbers_and_counts(values, expected):
    assert [(turn, fault.kind) for turn, fault in picture_faults(values)] == expected


def test_one_picture_is_no_plural():
    (fault,) = [fault for _, fault in picture_faults([f"Picture 1: {IMG}a", "See Picture 2."])]
    assert fault.detail.endswith(", and the row has 1 picture")


ROWS = {
    "good": ({"id": "a", "conversations": dialogue(f"Picture 1: {IMG}?", "b")}, []),
    "no id": ({"conversations": dialogue("a", "b")}, []),
    "a list": ([1], ["form"]),
    "no dialogue": ({"id": "a", "text": "b"}, ["form"]),
    "no turns": ({"conversations": []}, ["form"]),
    "a turn without a value": ({"conversations": [{"from": "user"}]}, ["form"]),
    "a role that is a list": ({"conversations": [{"from": [], "value": "a"}]}, ["form"]),
    "only an answer": (
        {"conversations": [{"from": "assistant", "value": "a"}]},
        ["order"],
    ),
    "system": ({"conversations": dialogue("a", "b"), "system": 1}, ["form"]),
    "LLaVA": (
        {
            "image": "x.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\na"},
                {"from": "gpt", "value": "b"},
            ],
        },
        ["role", "role", "foreign_format", "foreign_format"],
    ),
    "answer first": ({"conversations": dialogue("a", "b", "c")[1:]}, ["order", "order"]),
    "swapped": (
        {"conversations": dialogue("", f"Picture 1: {IMG}?", "b", "c", "d")[1:]},
        ["order", "order"],
    ),
    "question last": ({"conversations": dialogue("a", "b", "c")}, ["order"]),
    "two answers": ({"conversations": [*dialogue("a", "b"), *dialogue("a", "c")[1:]]}, ["order"]),
    "empty answer": ({"conversations": dialogue("a", "")}, ["empty"]),
    "address": (
        {"conversations": dialogue("Picture 1: <img>http://x/a.png</img>", "b")},
        ["picture_address"],
    ),
    "no path": ({"conversations": dialogue("Picture 1: <img></img>", "b")}, ["empty"]),
    "unclosed": (
        {"conversations": dialogue("Picture 1: <img>a.png", "b")},
        ["tag", "picture_count"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_faults_of_a_row(name, folder):
    row, expected = ROWS[name]
    assert kinds_of(folder, row, Checks(load_tokenizer(NANO, slots=16))) == expected


@pytest.mark.parametrize(
    ("name", "thorough", "quick"),
    [
        ("a.png", [], []),
        ("none.png", ["picture_missing"], ["picture_missing"]),
        (".", ["picture_missing"], ["picture_missing"]),
        ("cut.png", ["picture_unreadable"], []),
        ("empty.png", ["picture_unreadable"], ["picture_unreadable"]),
        ("sound.png", ["picture_unreadable"], ["picture_unreadable"]),
        ("page.png", ["picture_unreadable"], ["picture_unreadable"]),
        ("long" * 99, ["picture_unreadable"], ["picture_unreadable"]),  # no system has such names
    ],
)
def test_picture_files(name, thorough, quick, folder):
    row = {"conversations": dialogue(f"Picture 1: <img>{name}</img>\n?", "b")}
    assert kinds_of(folder, row) == thorough
    assert kinds_of(folder, row, Checks(decode=False)) == quick


def test_a_cut_through_a_picture_is_told_from_one_through_text(folder):
    tokenizer = load_tokenizer(NANO, slots=4)
    values = [f"Picture 1: {IMG}what?", "a star", f"Picture 2: {IMG}and this?", "a ring"]
    row = {"conversations": dialogue(*values)}
    path = folder / "rows.json"
    path.write_text(json.dumps([row]), encoding="utf-8")
    source = Conversations(path)
    found = {}
    for length in range(1, 100):
        checked = check_rows(source, Checks(tokenizer, length), range(1))
        found[length] = [problem.kind for problem in checked.problems]
    in_pictures = [length for length, kinds in found.items() if kinds == ["cut_picture"]]
    # a plain cut after <img> or after any slot leaves a picture without its </img>
    assert len(in_pictures) == 2 * (tokenizer.slots + 1)
    fitting = [length for length, kinds in found.items() if kinds == []]
    assert fitting == list(range(fitting[0], 100))


def test_long_rows_are_counted_and_short_ones_skipped(folder, monkeypatch):
    tokenizer = load_tokenizer(NANO, slots=16)
    row = {"conversations": dialogue("word " * 30, "b")}
    assert kinds_of(folder, row, Checks(tokenizer, 40)) == ["too_long"]
    monkeypatch.setattr("qwenvl_jax.data.lint.rows.render_example", None)  # must not be called
    assert kinds_of(folder, row, Checks(tokenizer, 400)) == []


def test_equal_ids_name_their_first_row(folder):
    names = ["a", "b", "a", 3, "a", "3", None]
    rows = [{"id": name, "conversations": dialogue("a", "b")} for name in names]
    del rows[-1]["id"]
    path = folder / "rows.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    source = Conversations(path)
    hashes = check_rows(source, Checks(), range(7)).id_hashes
    assert hashes[-1] == 0
    assert hashes.dtype == np.uint64
    assert hashes[0] == id_hash("a") != id_hash("b")
    told = [(problem.row, problem.detail) for problem in duplicate_ids(source, hashes)]
    assert told == [
        (2, "'a' is also the id of row 0"),
        (4, "'a' is also the id of row 0"),
        (5, "'3' is also the id of row 3"),
    ]


# --- the command ----------------------------------------------------------------------------------


def test_the_broken_sample_shows_everything_at_once(capsys):
    words = [str(SAMPLES / "broken.json"), "--tokenizer", NANO, "--slots", "256"]
    assert data.main(["lint", *words]) == PROBLEMS
    out = capsys.readouterr().out
    assert "problems, in 7 of 7 rows" in out
    for kind in ("role", "box_reversed", "picture_missing", "picture_unreadable", "duplicate_id"):
        assert f"\n{kind}: 1 - " in out or f"\n{kind}: 2 - " in out
    assert "row 0 (line 2, id 'shelf_0', turn 1): <box>(875,685),(625,925)</box>" in out


def test_the_good_sample_is_clean(capsys):
    assert data.main(["lint", str(SAMPLES / "shelf.json")]) == SUCCESS
    out = capsys.readouterr().out
    assert out == (
        f"{SAMPLES / 'shelf.json'}: 6 rows, no problems\n"
        "lengths were not checked: give --tokenizer for that\n"
    )


def test_json_holds_every_problem_and_the_exit_code_is_the_same(capsys):
    assert data.main(["lint", str(SAMPLES / "broken.json"), "--json"]) == PROBLEMS
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 7
    assert sum(told["counts"].values()) == len(told["problems"])
    assert {"kind", "row", "line", "id", "turn", "detail"} == set(told["problems"][0])
    assert data.main(["lint", str(SAMPLES / "shelf.json"), "--json"]) == SUCCESS
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_the_whole_rows_of_a_cut_file_are_checked_too(folder, capsys):
    path = folder / "rows.json"
    rows = [{"id": "x", "conversations": dialogue("a", "")}, {"conversations": dialogue("a", "b")}]
    path.write_text(json.dumps(rows)[:-9], encoding="utf-8")
    assert data.main(["lint", str(path)]) == PROBLEMS
    out = capsys.readouterr().out
    assert "is cut off in row 1" in out
    assert "row 0 (line 1, id 'x', turn 1): no words" in out


def test_examples_are_counted_and_cut_and_cannot_touch_the_terminal(folder, capsys):
    path = folder / "rows.json"
    row = {"conversations": dialogue("Picture 1: <img>\x1b[31mno.png</img>", "b")}
    path.write_text(json.dumps([row] * 9), encoding="utf-8")
    assert data.main(["lint", str(path), "--show", "2"]) == PROBLEMS
    out = capsys.readouterr().out
    assert "picture_missing: 9 - " in out
    assert "  and 7 more" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nothing.json"], "No such file"),
        ([NANO], "lint takes a file: got the folder"),
        ([str(SAMPLES / "shelf.json"), "--length", "0"], "--length must be positive"),
        ([str(SAMPLES / "shelf.json"), "--processes", "0"], "--processes must be positive"),
        ([str(SAMPLES / "shelf.json"), "--tokenizer", "nowhere"], "no vocabulary"),
        ([str(SAMPLES / "shelf.json"), "--tokenizer", NANO, "--slots", "0"], "--slots must be"),
    ],
)
def test_wrong_options_are_one_line(words, told, capsys):
    assert data.main(["lint", *words]) == USAGE_ERROR
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


# --- the pass over rows ---------------------------------------------------------------------------


def test_processes_give_the_same_results_in_the_same_order(folder):
    path = folder / "rows.json"
    rows = [
        {"id": i // 2, "conversations": dialogue("a", "" if i % 7 else "b")} for i in range(1500)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
    source = Conversations(path)
    work = Work(source)
    alone = list(pass_over(work, len(source), 1, "rows"))
    spread = list(pass_over(work, len(source), 2, "rows"))
    assert [checked.problems for checked in spread] == [checked.problems for checked in alone]
    assert len(alone) == 3
    assert sum(len(checked.problems) for checked in alone) == sum(1 for i in range(1500) if i % 7)


class Work:
    def __init__(self, source: Conversations):
        self.source = source

    def __call__(self, rows: range):
        return check_rows(self.source, Checks(), rows)


def fail(rows: range):
    raise ConfigError(f"at {rows.start}")


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_in_a_pass_reaches_the_caller(processes):
    with pytest.raises(ConfigError, match="at 0"):
        list(pass_over(fail, 3000, processes, "rows"))


def die(rows: range):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_a_pass_is_told():
    with pytest.raises(ConfigError, match=r"was killed, .* use a smaller --processes"):
        list(pass_over(die, 3000, 2, "rows"))


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    """Its output ends when the last process that could write to it has ended."""
    program = "from test_data_lint import kill_the_parent as kill; kill()"
    environment = {"PYTHONPATH": f"{HERE}:{HERE.parent}", "PATH": ""}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


def kill_the_parent() -> None:
    for _ in spread(abs, range(100), 2):
        os.kill(os.getpid(), signal.SIGKILL)


def test_progress_is_told_in_lines_where_there_is_no_terminal(capsys):
    assert sum(pass_over(len, 10_000, 1, "rows")) == 10_000
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 10
    assert told[-1] == "rows: 10000 of 10000"
