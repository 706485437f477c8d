"""Files that are replaced as a whole or added to line by line, on a disk that is full meanwhile."""

import errno
import json
import math
import os
from pathlib import Path

import pytest

from qwenvl_jax.files import Lines, json_line, replace, replace_text


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "manifest.json"
    replace_text(file, "fünf")
    replace_text(file, "six")
    assert file.read_text() == "six"

    def half(beside):
        beside.write_text("sev")
        raise OSError(errno.ENOSPC, "No space left on device")

    def interrupted(beside):
        beside.write_text("sev")
        raise KeyboardInterrupt

    with pytest.raises(OSError, match="No space left"):
        replace(file, half)
    with pytest.raises(KeyboardInterrupt):
        replace(file, interrupted)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert file.read_text() == "six"


def test_lines_wait_where_a_full_disk_took_a_part(tmp_path, monkeypatch):
    lines, write, room = Lines(tmp_path / "list.jsonl"), os.write, {"bytes": 5}

    def some(descriptor, data):
        if not room["bytes"]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken, room["bytes"] = min(room["bytes"], len(data)), 0
        return write(descriptor, data[:taken])

    with monkeypatch.context() as patch:
        patch.setattr("os.write", some)
        with pytest.raises(OSError, match="No space left"):
            lines.write("one", "two")
    assert lines.path.read_text() == "one\nt"
    assert lines.num_waiting == len("wo\n")
    lines.write("three")
    lines.close()
    assert lines.path.read_text() == "one\ntwo\nthree\n"


def test_a_line_that_a_kill_has_cut_is_ended_and_no_file_is_made_for_nothing(tmp_path):
    cut, empty = Lines(tmp_path / "cut.jsonl"), Lines(tmp_path / "empty.jsonl")
    cut.path.write_text('{"step": 1}\n{"st')
    for lines in (cut, empty):
        lines.flush()
    cut.write('{"step": 2}')
    for lines in (cut, empty):
        lines.close()
    assert cut.path.read_text().splitlines() == ['{"step": 1}', '{"st', '{"step": 2}']
    assert not empty.path.exists()


def test_a_line_of_json_has_null_for_what_is_no_number():
    record: dict = {"loss": math.nan, "replay": {"loss": -math.inf, "norm": 1.5}, "step": 3}
    record["list"] = [math.inf, (1,)]
    text = json_line(record | {"path": Path("a")}, default=str)
    expected = {"loss": None, "replay": {"loss": None, "norm": 1.5}, "step": 3}
    assert json.loads(text) == expected | {"list": [None, [1]], "path": "a"}
    with pytest.raises(TypeError):
        json_line({"path": Path("a")})
