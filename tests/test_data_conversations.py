"""The original fine-tuning files: rows found without parsing, ids as released, every bad file."""

import gzip
import json
import os
import pickle
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qwenvl_jax.cli.data import main
from qwenvl_jax.data import tasks
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.record import decode_record, encode_record
from qwenvl_jax.data.sources import json_rows
from qwenvl_jax.data.sources.conversations import Conversations
from qwenvl_jax.data.sources.json_rows import RowTable, find_rows
from qwenvl_jax.data.sources.open import open_source
from qwenvl_jax.data.turns import fit_turns
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "tokenizer.json").read_text(encoding="utf-8")
)
SLOTS = 16


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer("qwenvl_jax/assets/nano", slots=SLOTS)


@pytest.fixture(scope="module")
def released_tok() -> Tokenizer:
    dashscope = pytest.importorskip("dashscope", reason="it carries the published vocabulary")
    return load_tokenizer(Path(dashscope.__file__).parent / "resources" / "qwen.tiktoken")


def turn(role: str, value: str) -> dict[str, str]:
    return {"from": role, "value": value}


def row(name: str, *values: str) -> dict:
    turns = [turn(("user", "assistant")[i % 2], value) for i, value in enumerate(values)]
    return {"id": name, "conversations": turns}


ROWS = [
    row("a", "Picture 1: <img>one.png</img>\nWhat?", 'A "cat" \\ [dog]'),
    row("b", "你好", "{你好！} ]"),
    row("c", "x", "y", "Picture 1: <img>/abs/two.png</img>\nz", "w"),
]


def write(folder: Path, data: bytes | str | list, name: str = "rows.json") -> Path:
    if isinstance(data, list):
        data = json.dumps(data, ensure_ascii=False)
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def lines_of(rows: list) -> str:
    return "".join(json.dumps(one) + "\n" for one in rows)


# --- the rows of good files -----------------------------------------------------------------------

LAYOUTS = {
    "one line": json.dumps(ROWS),
    "indented": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "tight": json.dumps(ROWS, separators=(",", ":")),
    "lines": lines_of(ROWS),
    "lines without a last break": lines_of(ROWS).rstrip(),
    "lines with blank ones": "\n \n" + lines_of(ROWS).replace("\n", "\n\n \t\n"),
    "white space around": f" \n\t{json.dumps(ROWS)}\n \n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_windows", [False, True])
def test_every_layout_gives_the_same_rows(layout, is_windows, tmp_path):
    text = LAYOUTS[layout]
    data = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() if is_windows else text.encode()
    source = Conversations(write(tmp_path, data))
    assert [source.row(i) for i in range(len(source))] == ROWS
    first = source[0]
    assert (first.task, first.images) == ("chat", (tmp_path / "one.png",))
    assert source[2].images == (Path("/abs/two.png"),)
    for i in range(3):
        line = data[: source.rows.starts[i]].count(b"\n") + 1
        assert source[i].key == f"rows.json[{i}] (line {line}, id '{'abc'[i]}')"


TEXTS = st.text(st.sampled_from('ab"\\[]{},|\n 猫'), max_size=8)
VALUES = st.recursive(
    TEXTS | st.none() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=5),
    block=st.sampled_from([1, 2, 3, 7, 64]),
    indent=st.sampled_from([None, 1]),
    is_lines=st.booleans(),
)
def test_rows_are_found_wherever_blocks_end(rows, block, indent, is_lines, tmp_path_factory):
    text = lines_of(rows) if is_lines else json.dumps(rows, indent=indent, ensure_ascii=False)
    path = write(tmp_path_factory.mktemp("rows"), text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_BLOCK", block)
        table = find_rows(path)
    data = path.read_bytes()
    found = [
        json.loads(data[start:end]) for start, end in zip(table.starts, table.ends, strict=True)
    ]
    assert table.damage is None
    assert found == rows
    assert table.lines.tolist() == [data[:start].count(b"\n") + 1 for start in table.starts]


@pytest.mark.parametrize("layout", ["indented", "tight"])
def test_any_changed_byte_is_noticed(layout, tmp_path):
    """A list that is not JSON any more is damaged, or one of its rows is; none passes silently."""
    data = LAYOUTS[layout].encode()
    rng = random.Random(5)
    for _ in range(150):
        at = rng.randrange(len(data))
        changed = data[:at] + bytes([rng.choice(b'"\\[]{},x')]) + data[at + 1 :]
        if rng.random() < 0.3:
            changed = data[:at]
        try:
            expected = json.loads(changed)
        except ValueError:
            expected = None
        table = find_rows(write(tmp_path, changed))
        found = [parsed(changed[s:e]) for s, e in zip(table.starts, table.ends, strict=True)]
        if isinstance(expected, list) and all(isinstance(one, dict) for one in expected):
            assert (found, table.damage) == (expected, None)
        else:
            assert table.damage is not None or None in found, changed


def parsed(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_threads_and_pickled_copies_read_the_same(tmp_path):
    source = Conversations(write(tmp_path, [row(str(i), "q", f"answer {i}") for i in range(200)]))
    before = source[7]
    sent = pickle.dumps(source)
    del source  # its open file goes with it: the other one must have its own
    source = pickle.loads(sent)
    assert source[7] == before
    with ThreadPoolExecutor(4) as pool:
        keys = list(pool.map(lambda i: source.row(i)["id"], range(200)))
    assert keys == [str(i) for i in range(200)]
    with pytest.raises(IndexError, match="row 200"):
        source[200]
    with pytest.raises(IndexError):
        source[-1]


def test_pictures_have_a_folder_of_their_own(tmp_path):
    (tmp_path / "pictures").mkdir()
    path = write(tmp_path, ROWS)
    source = open_source(path, pictures=tmp_path / "pictures")
    assert source[0].images == (tmp_path / "pictures" / "one.png",)
    assert source[2].images == (Path("/abs/two.png"),)
    with pytest.raises(DataError, match=r"no folder of pictures at .*nowhere"):
        open_source(path, pictures=tmp_path / "nowhere")


def test_a_row_goes_through_bytes_with_its_pictures(tmp_path, tok):
    (tmp_path / "one.png").write_bytes(b"picture")
    source = Conversations(write(tmp_path, ROWS))
    read = decode_record(encode_record(source[0]), "here")
    assert read.images == (b"picture",)
    assert np.array_equal(tasks.example_of(read, tok).ids, tasks.example_of(source[0], tok).ids)


# --- fingerprints ---------------------------------------------------------------------------------


def test_the_fingerprint_notices_any_changed_row_and_no_other_date(tmp_path):
    rows = [row(str(i), "q" * 40, f"answer {i:04d}") for i in range(3000)]
    path = write(tmp_path, rows)
    before = Conversations(path).fingerprint
    path.touch()
    assert Conversations(path).fingerprint == before
    rows[1234]["conversations"][1]["value"] = "answer 9234"  # the same length
    assert Conversations(write(tmp_path, rows)).fingerprint != before
    assert Conversations(write(tmp_path, rows, "other.json")).fingerprint != before


def test_a_file_that_shrinks_after_opening_is_told(tmp_path):
    source = Conversations(write(tmp_path, ROWS))
    write(tmp_path, ROWS[:1])
    with pytest.raises(DataError, match="has changed since it was opened"):
        source[0]


# --- files that are no list of rows ---------------------------------------------------------------

WHOLE = json.dumps(ROWS)
FILES = {
    "empty": (b"", "holds no rows: got an empty file"),
    "white space": (b" \n", "holds no rows: got white space only"),
    "empty list": (b" [ ]\n", "holds no rows: got an empty list"),
    "words": (b"hello", "is not JSON in UTF-8: got 'hell' as its start"),
    "number": (b"17", "is not JSON"),
    "utf-16": (WHOLE.encode("utf-16"), "got UTF-16 text"),
    "gzip": (gzip.compress(WHOLE.encode()), "got gzip data"),
    "object over lines": (json.dumps({"data": ROWS}, indent=1).encode(), "neither a list of rows"),
    "cut in a row": (WHOLE[:-30].encode(), r"cut off in row 2, line 1: got no \]"),
    "cut in a string": (WHOLE[:-9].encode(), "cut off in row 2"),
    "cut after a comma": (WHOLE[: WHOLE.index('{"id": "c"')].encode(), r"cut off: got no \]"),
    "only a bracket": (b"[", r"cut off: got no \]"),
    "lines cut": (lines_of(ROWS)[:-9].encode(), "cut off in its last row: line 3 is not JSON"),
    "comma at the end": (WHOLE[:-1].encode() + b",]", "at the end of its list, line 1: got ','"),
    "no comma": (WHOLE.replace("}, {\"id\"", '} {"id"').encode(), "before row 1, .*one comma"),
    "two commas": (WHOLE.replace("}, {\"id\"", '},, {"id"').encode(), "before row 1"),
    "null among rows": (WHOLE.replace("}, {\"id\"", '}, null, {"id"').encode(), "got ', null, '"),
    "text as the first row": (WHOLE.replace("[", '["hi", ', 1).encode(), "before row 0"),
    "list of texts": (b'["a", "b"]', "something else than rows"),
    "two lists": (WHOLE.encode() + b"\n[]", r"after the end of its list, in line 2: got '\[\]'"),
    "wrong bracket": (WHOLE[:-1].encode() + b"}", "goes on after the end of its list"),
    "odd quote": (WHOLE.replace('"b"', '"b').encode(), "a broken one: row 1, line 1, is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_one_clear_line(name, tmp_path):
    data, message = FILES[name]
    with pytest.raises(DataError, match=message) as caught:
        Conversations(write(tmp_path, data))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "rows.json"))


def test_the_whole_rows_of_a_damaged_file_can_still_be_read(tmp_path):
    path = write(tmp_path, WHOLE[:-30])
    table = find_rows(path)
    source = Conversations(path, rows=table)
    assert [source.row(i) for i in range(len(source))] == ROWS[:2]


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="is not a file: got a pipe"):
        Conversations(tmp_path / "pipe.json")


def test_other_keys_of_a_turn_are_left_out(tmp_path):
    turns = [one | {"score": 10**30} for one in ROWS[1]["conversations"]]
    record = Conversations(write(tmp_path, [{"conversations": turns, "score": 1}]))[0]
    assert record.fields == {"conversations": ROWS[1]["conversations"]}
    assert decode_record(encode_record(record), "here") == record


def test_a_large_row_is_refused_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.data.sources.conversations.MAX_ROW_BYTES", 100)
    with pytest.raises(DataError, match=r"too long: got 1\d\d bytes, expected at most 100"):
        Conversations(write(tmp_path, ROWS))[0]


# --- rows that are no dialogue --------------------------------------------------------------------

BAD_ROWS = {
    "a list": ([1], "is no object: got list"),
    "other keys": ({"id": "z", "text": "hi"}, "has no dialogue: got keys 'id', 'text'"),
    "a text": ({"conversations": "hi"}, "has no dialogue"),
    "texts": ({"conversations": ["hi"]}, "has no dialogue"),
    "no turns": ({"conversations": []}, "no turn of the user"),
    "roles": ({"conversations": [turn("human", "x")]}, "turn 0 must be"),
    "no value": ({"conversations": [{"from": "user"}]}, "turn 0 must be"),
    "number": ({"conversations": [{"from": "user", "value": 3}]}, "turn 0 must be"),
    "unclosed": (row("z", "<img>a", "b"), "<img> is not closed"),
    "address": (row("z", "<img>https://x.org/a.png</img>", "b"), "never fetched"),
    "data url": (row("z", "<img>data:image/png;base64,AA</img>", "b"), "never fetched"),
    "no path": (row("z", "<img> </img>", "b"), "without a path"),
    "system": (row("z", "a", "b") | {"system": 3}, "a system that is no text: got 3"),
    "OpenAI's keys": (
        {"conversations": [{"role": "user", "content": "x"}]},
        "turn 0 must be .*: got keys 'role', 'content'",
    ),
    "LLaVA's pictures": (
        row("z", "<image>\nWhat?", "b") | {"image": "a.png"},
        "by the key 'image', which is not read: got 'a.png', expected 'Picture 1: ",
    ),
    "roles swapped": (
        {"conversations": [turn("assistant", "<img>a.png</img>\nWhat?"), turn("user", "b")]},
        "starts with an answer, and that shows a picture: got .*; are user and assistant swapped",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_and_the_others_stay_good(name, tmp_path, tok):
    bad, message = BAD_ROWS[name]
    source = Conversations(write(tmp_path, [ROWS[0], bad, ROWS[1]]))
    with pytest.raises(DataError, match=message) as caught:
        source[1]
    assert re.match(r"row rows\.json\[1\] \(line 1(, id 'z')?\)", str(caught.value))
    assert "\n" not in str(caught.value)
    assert source[2].fields["conversations"] == ROWS[1]["conversations"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b", "conversations": [}', "is not JSON: .* at its character"),
        (b'{"id": "\xff"}', "is not JSON: not UTF-8 at its byte 8"),
        (b'{"a": {"b": 1, "b": 2}}', "is not JSON: 'b' stands twice in one object"),
        (b'{"a":' * 60000 + b"1" + b"}" * 60000, "is not JSON: nested too deeply"),
    ],
)
def test_a_broken_line_is_a_row_error(line, message, tmp_path):
    good = json.dumps(ROWS[0]).encode()
    source = Conversations(write(tmp_path, b"\n".join([good, line, good]), "rows.jsonl"))
    with pytest.raises(DataError, match=rf"rows.jsonl\[1\] \(line 2\) {message}"):
        source[1]
    assert len(source) == 3
    assert source[2].images == source[0].images


def test_ids_may_be_missing_equal_or_numbers(tmp_path):
    turns = ROWS[1]["conversations"]
    rows = [{"conversations": turns}, {"id": 5, "conversations": turns}]
    source = Conversations(write(tmp_path, [*rows, rows[1]]))
    keys = [source[i].key for i in range(3)]
    assert keys[0] == "rows.json[0] (line 1)"
    assert keys[1:] == ["rows.json[1] (line 1, id '5')", "rows.json[2] (line 1, id '5')"]


HARD_TEXTS = {
    "half a surrogate pair": ('"\\ud83d"', "\ufffd"),
    "a whole pair": ('"\\ud83d\\ude00"', "😀"),
    "NUL": ('"a\\u0000b"', "a\0b"),
    "doubled backslashes": ('"a\\\\\\\\"', "a\\\\"),
    "right to left": ('"שלום"', "שלום"),
    "a million letters": (json.dumps("ab " * 333_333), "ab " * 333_333),
    "markers": ('"<|im_end|><|endoftext|>"', "<|im_end|><|endoftext|>"),
}


@pytest.mark.parametrize("name", HARD_TEXTS)
def test_hard_texts_are_data(name, tmp_path, tok):
    written, meant = HARD_TEXTS[name]
    turns = f'{{"from": "user", "value": "q"}}, {{"from": "assistant", "value": {written}}}'
    record = Conversations(write(tmp_path, f'[{{"conversations": [{turns}]}}]'))[0]
    assert record.fields["conversations"][1]["value"] == meant
    assert decode_record(encode_record(record), "here") == record
    ids = tasks.example_of(record, tok).ids
    assert np.count_nonzero(ids == tok.im_end_id) == 3
    assert tok.endoftext_id not in ids


# --- ids and labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("is_lines", [False, True])
def test_ids_and_labels_equal_the_published_ones(is_lines, tmp_path, released_tok):
    cases = GOLDEN["finetune"]
    rows = [{"id": str(i), "conversations": case["conversations"]} for i, case in enumerate(cases)]
    source = open_source(write(tmp_path, lines_of(rows) if is_lines else json.dumps(rows)))
    pictures = {*range(256), released_tok.image_pad_id}
    for i, case in enumerate(cases):
        example = tasks.example_of(source[i], released_tok, "released")
        size = len(example.ids)
        is_inside = False
        for ours, theirs in zip(example.ids.tolist(), case["input_ids"][:size], strict=True):
            if theirs == released_tok.image_end_id:
                is_inside = False
            if is_inside:  # the published tokenizer writes the path's bytes into the slots
                assert theirs in pictures
                assert ours == released_tok.image_pad_id
            else:
                assert ours == theirs
            is_inside = is_inside or theirs == released_tok.image_start_id
        assert set(case["input_ids"][size:]) == {released_tok.endoftext_id}
        labels = np.where(example.is_target, example.ids, -100)
        assert labels.tolist() == case["labels"][:size]
        assert set(case["labels"][size:]) == {-100}


def test_assistant_only_learns_the_answers_and_their_end(tmp_path, released_tok):
    source = Conversations(write(tmp_path, ROWS))
    example = tasks.example_of(source[2], released_tok, "assistant_only")
    assert released_tok.decode(example.ids[example.is_target]) == "y<|im_end|>w<|im_end|>"
    assert example.images == (Path("/abs/two.png"),)


def test_a_first_answer_is_dropped_and_the_pictures_stay(tmp_path, tok):
    turns = [turn("assistant", "see"), *ROWS[0]["conversations"]]
    record = Conversations(write(tmp_path, [{"conversations": turns}]))[0]
    assert record.images == (tmp_path / "one.png",)
    assert len(tasks.example_of(record, tok).images) == 1


def test_a_system_text_of_the_row_is_used(tmp_path, tok):
    record = Conversations(write(tmp_path, [ROWS[1] | {"system": "Be brief."}]))[0]
    assert "system\nBe brief.<|im_end|>" in tok.decode(tasks.example_of(record, tok).ids)


# --- rows that are too long -----------------------------------------------------------------------


def long_row(folder: Path):
    values = []
    for i in range(4):
        values += [f"Picture {i + 1}: <img>{i}.png</img>\nquestion {i}", f"answer {i} <img>x</img>"]
    return Conversations(write(folder, [row("long", *values)]))[0]


def test_whole_last_turns_are_dropped_with_their_pictures(tmp_path, tok):
    record = long_row(tmp_path)
    full = tasks.example_of(record, tok)
    assert fit_turns(record, tok, len(full.ids)) is record
    answer_ends = np.flatnonzero(full.ids == tok.im_end_id)[2::2] + 2  # a newline follows each
    sizes = answer_ends.tolist()
    for length in (size + more for size in sizes for more in (-1, 0, 1)):
        if length < sizes[0]:
            with pytest.raises(DataError, match=f"answer alone do not fit into {length};"):
                fit_turns(record, tok, length)
            continue
        shorter = fit_turns(record, tok, length)
        example = tasks.example_of(shorter, tok)  # raises where pictures and text do not match
        num_turns = max(n for n, size in enumerate(sizes, 1) if size <= length)
        assert len(example.ids) == sizes[num_turns - 1]
        assert np.array_equal(example.ids, full.ids[: len(example.ids)])
        assert example.images == full.images[: 2 * num_turns]
        assert shorter.key == record.key


def test_a_cut_counts_the_turns_after_a_dropped_first_answer(tmp_path, tok):
    turns = [turn("assistant", "hello"), *row("", "a", "b", "c" * 90, "d")["conversations"]]
    record = Conversations(write(tmp_path, [{"conversations": turns}]))[0]
    shorter = fit_turns(record, tok, len(tasks.example_of(record, tok).ids) - 5)
    assert shorter.fields["conversations"] == turns[:3]


def test_a_question_without_an_answer_is_no_place_to_cut(tmp_path, tok):
    turns = [turn("user", "a"), turn("user", "b"), turn("assistant", "c"), turn("assistant", "d")]
    turns += [turn("user", "e" * 80), turn("assistant", "f")]
    record = Conversations(write(tmp_path, [{"conversations": turns}]))[0]
    shorter = fit_turns(record, tok, len(tasks.example_of(record, tok).ids) - 3)
    assert shorter.fields["conversations"] == turns[:4]
    with pytest.raises(DataError, match="do not fit"):  # nor is half of an answer in two turns
        fit_turns(record, tok, len(tasks.example_of(shorter, tok).ids) - 1)


# --- opening by path ------------------------------------------------------------------------------


def test_open_source_says_what_it_can_open(tmp_path):
    with pytest.raises(DataError, match=r"no data at .*nothing.json"):
        open_source(tmp_path / "nothing.json")
    with pytest.raises(DataError, match=r"folder without index.json or dataset_info.json"):
        open_source(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match="cannot be opened as training data: got a file"):
        open_source(tmp_path / "rows.csv")
    with pytest.raises(DataError, match=r"only for .json and .jsonl"):
        open_source(tmp_path, pictures=tmp_path)
    assert len(open_source(str(write(tmp_path, ROWS, "ROWS.JSON")))) == 3


def test_a_table_of_many_rows_keeps_three_numbers_a_row(tmp_path):
    table = find_rows(write(tmp_path, [row(str(i), "q" * 50, "a" * 50) for i in range(5000)]))
    assert isinstance(table, RowTable)
    held = sum(part.nbytes for part in (table.starts, table.ends, table.lines))
    assert held == 5000 * 24
    assert table.starts.base is None or table.starts.base.nbytes < 10 * held


def test_the_lines_of_the_docs_convert_what_llava_reads(tmp_path, monkeypatch):
    page = Path("docs/data.md").resolve().read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import json\n.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)
    rows = [
        {"id": "1", "image": "a.png", "conversations": [("human", "<image>\nWhat?"), ("gpt", "x")]},
        {"id": "2", "conversations": [("human", "Hi"), ("gpt", "hello")]},
        {
            "id": "3",
            "image": ["a.png", "b.png"],
            "conversations": [("human", "Which?\n<image>\n<image>"), ("gpt", "y")],
        },
    ]
    for row in rows:
        row["conversations"] = [{"from": who, "value": text} for who, text in row["conversations"]]
    Path("llava.json").write_text(json.dumps(rows))
    exec(code, {})
    source = Conversations("my.json")
    said = [source[i].fields["conversations"][0]["value"] for i in range(3)]
    assert said == [
        "Picture 1: <img>a.png</img>\nWhat?",
        "Hi",
        "Which?\nPicture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>",
    ]
    assert main(["lint", "my.json"]) == 0
