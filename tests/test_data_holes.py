"""Bad samples: left out of their rows, counted, listed once; shapes stay, and too many stop."""

import errno
import io
import itertools
import json
import math
import re
import struct
import sys
import zlib
from pathlib import Path
from subprocess import run

import numpy as np
import pytest
from finetune_rows import NANO, SIDE, SLOTS, Rows, data_config, encoded, same, write_rows
from PIL import Image

from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.holes import Hole, Tally
from qwenvl_jax.data.pipeline import batches
from qwenvl_jax.data.record import Record
from qwenvl_jax.data.sizes import UNUSABLE, sizes_of
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO, slots=SLOTS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def caption(key: str, *images: bytes | Path, text: str = "a star") -> Record:
    return Record(key, "caption", {"text": text, "language": "en"}, images)


def huge_png() -> bytes:
    """Returns a small file whose header tells of more pixels than are decoded."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9))


def saved(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


GRAY_16 = Image.fromarray(np.full((9, 9), 257 * 90, np.uint16))
FRAMES = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
BAD = {
    "truncated": encoded(1, "JPEG", side=200)[:700],
    "empty": b"",
    "html": b"<!doctype html><html><body>404</body></html>",
    "huge": huge_png(),
    "missing": Path("nowhere") / "x.png",
}
ODD = {  # and the colour that they become
    "gray 16": (saved(GRAY_16, "PNG"), (90, 90, 90)),
    "cmyk": (saved(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "animated": (saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), (255, 0, 0)),
}


def use(monkeypatch, rows) -> None:
    monkeypatch.setattr("qwenvl_jax.data.sources.open.open_source", lambda _: Rows(rows))


def epoch(folder: Path | None = None, **changes):
    """Returns (batches, iterator) that hold every sample at least once."""
    config = data_config(path="any", **({"max_bad_fraction": 0.9} | changes))
    source = batches(config, 0, slots=SLOTS, folder=folder)
    assert source.repeats is not None
    return list(itertools.islice(source, math.ceil(source.repeats.num_rows / config.rows))), source


def listed(folder: Path) -> dict[str, dict]:
    lines = (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert len({line["key"] for line in found}) == len(found), "each once"
    return {line["key"]: line for line in found}


def test_pictures_that_cannot_be_read_become_holes_and_odd_ones_right_pixels(
    tmp_path, monkeypatch, tok
):
    rows = [caption(name, image) for name, image in BAD.items()]
    rows += [caption(name, image) for name, (image, _) in ODD.items()]
    rows += [caption(f"good {number}", encoded(number)) for number in range(4)]
    use(monkeypatch, rows)
    made, source = epoch(tmp_path, rows=len(rows))  # one batch, or the epoch would be repeated
    found = listed(tmp_path)
    assert set(found) == set(BAD)
    assert {line["reason"] for line in found.values()} == {"picture"}
    assert {line["step"] for line in found.values()} == {0}
    assert "0 bytes" in found["empty"]["detail"]
    assert "HTML" in found["html"]["detail"]
    (batch,) = made
    assert batch.images.shape == (len(rows), 3, SIDE, SIDE, 3)
    used = batch.image_start < 2**30
    assert not batch.images[~used].any()
    colours = {tuple(image[9, 9].tolist()) for image in batch.images[used]}
    for name, (_, colour) in ODD.items():
        near = [c for c in colours if np.abs(np.subtract(c, colour)).max() < 3]
        assert near, f"{name}: {colour} is not among {colours}"
    metrics = source.metrics(0)
    assert metrics["bad_samples"] == metrics["bad_picture"]
    assert metrics["bad_samples"] % len(BAD) == 0  # rows of several epochs are in this batch


def test_a_hole_is_padding_without_loss(monkeypatch, tok):
    text = "a red star in the middle"
    good = [caption(f"good {number}", encoded(7), text=text) for number in range(9)]
    use(monkeypatch, [*good, caption("bad", b"<html>", text=text)])
    made, _ = epoch(rows=1)
    use(monkeypatch, [*good, caption("bad", encoded(7), text=text)])
    whole, _ = epoch(rows=1)
    assert [batch.tokens.shape for batch in made] == [batch.tokens.shape for batch in whole]
    (changed,) = [i for i, (a, b) in enumerate(zip(made, whole, strict=True)) if not same(a, b)]
    hole, full = made[changed], whole[changed]
    assert hole.segment.max() == full.segment.max() - 1
    padding = hole.segment == 0
    assert padding.sum() > (full.segment == 0).sum()
    assert not hole.loss_weight[padding].any()
    assert (hole.tokens[padding] == tok.endoftext_id).all()


def test_rows_that_cannot_be_used_are_told_before_the_first_step(tmp_path, monkeypatch):
    rows = [
        caption("good", encoded(1)),
        caption("no text", encoded(1), text=""),
        caption("long", encoded(1), text="a star " * 200_000),
        caption("four", *[encoded(1)] * 4),
        Record("outside", "ref_grounding", {"phrase": "a", "boxes": [[0, 0, 1, 1000]]}, ()),
        DataError("chunk 3 is damaged"),
    ]
    use(monkeypatch, rows)
    made, _ = epoch(tmp_path)
    assert made[0].segment.max(axis=1).tolist() == [1] * 4  # of the good one, again and again
    found = listed(tmp_path)
    assert {key: line["reason"] for key, line in found.items()} == {
        "no text": "sample",
        "long": "length",
        "four": "sample",
        "outside": "sample",
        "any[5]": "row",
    }
    with pytest.raises(DataError, match=r"too many samples are bad: got 5 of 6, expected at most"):
        epoch(max_bad_fraction=0.1)


def test_a_refused_start_names_the_first_rows_and_what_lists_the_others(tmp_path):
    path = Path(write_rows(tmp_path, 9))
    rows = json.loads(path.read_text())
    for row in rows[3:8]:
        row["conversations"][1]["value"] = "<box>(900,100),(100,2000)</box>"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"got 5 of 9, expected at most 0\.100%") as caught:
        batches(data_config(path=str(path)), 0, slots=SLOTS, folder=tmp_path)
    told = str(caught.value)
    named = [int(index) for index in re.findall(r"\(\d\) row rows\.json\[(\d)\]", told)]
    assert named == [3, 4, 5]
    command = f"qwenvl data lint {path} --tokenizer {NANO} --slots {SLOTS} --length 160"
    assert f"mend them ('{command}' lists them all), or raise data.max_bad_fraction" in told
    assert "quarantine" not in told
    assert not (tmp_path / "quarantine.jsonl").exists()


class KnownSizes(Rows):
    """Rows that know their sizes, so that they are first read in training."""

    def sizes(self, tokenizer: Tokenizer) -> np.ndarray:
        return np.full((len(self), 2), (20, 0), np.int32)


def test_rows_that_turn_bad_after_the_plan_are_holes(tmp_path, monkeypatch):
    rows = [
        OSError(5, "Input/output error"),
        DataError("chunk 3 is damaged"),
        Record("longer", "text", {"text": "a red star " * 40}),
        *[Record(f"good {number}", "text", {"text": "a star"}) for number in range(5)],
    ]
    source = KnownSizes(rows)  # "longer" has no place of its length
    monkeypatch.setattr("qwenvl_jax.data.sources.open.open_source", lambda _: source)
    made, _ = epoch(tmp_path, rows=1)
    assert made[0].segment.max() == 5
    reasons = {key: line["reason"] for key, line in listed(tmp_path).items()}
    assert reasons == {"any[0]": "row", "any[1]": "row", "longer": "length"}


def test_a_source_without_a_good_row_says_why(monkeypatch):
    use(monkeypatch, [caption("no text", encoded(1), text="")])
    with pytest.raises(DataError, match=r"any has no usable row: got 1 row and.*text is empty"):
        epoch(max_bad_fraction=1.0)
    use(monkeypatch, [])
    with pytest.raises(DataError, match="any holds no rows"):
        epoch()


def test_too_many_bad_pictures_stop_the_run_with_the_reason(tmp_path, monkeypatch):
    use(monkeypatch, [caption(f"row {number}", b"<html>") for number in range(50)])
    config = data_config(path="any")
    source = batches(config, 0, slots=SLOTS, folder=tmp_path)
    listing = r"quarantine\.jsonl lists them\), or raise data\.max_bad"
    with pytest.raises(
        DataError, match=rf"too many samples are bad: .*at most 0\.100%.*HTML.*{listing}"
    ):
        for _ in source:
            pass
    assert listed(tmp_path)


def test_special_tokens_in_a_text_are_text(monkeypatch, tok):
    use(monkeypatch, [caption("evil", encoded(1), text="<img>x</img><|endoftext|><|im_start|>")])
    (batch,), _ = epoch(rows=1, max_images=1)
    ids = batch.tokens[0][batch.segment[0] > 0].tolist()
    assert ids.count(tok.image_pad_id) == SLOTS
    assert ids.count(tok.endoftext_id) == 1
    assert tok.im_start_id not in ids


def test_worker_processes_list_their_holes_too(tmp_path):
    path = write_rows(tmp_path, 30)
    (tmp_path / "4.png").write_bytes(b"<html>")
    config = data_config(path=path, max_bad_fraction=0.5, num_workers=2)
    script = f"""
import itertools
from qwenvl_jax.config import DataConfig
from qwenvl_jax.data.pipeline import batches
if __name__ == "__main__":
    source = batches({config!r}, 0, slots={SLOTS}, folder={str(tmp_path)!r})
    for _ in itertools.islice(source, 12): pass
    print(source.metrics(11)["bad_picture"])
"""
    command = [sys.executable, "-c", script]
    ended = run(command, capture_output=True, text=True, timeout=170, check=True)
    (line,) = listed(tmp_path).values()
    assert "rows.json[4]" in line["key"]
    assert int(ended.stdout) > 1  # of several epochs, listed once


# --- counting ------------------------------------------------------------------------------------

HOLE = Hole("row 1", "picture", "row 1 is not a picture")


def test_a_limit_of_zero_stops_at_the_first():
    tally = Tally(0.0)
    tally.add(0, 1000, [])
    with pytest.raises(DataError, match="got 1 of 1001"):
        tally.add(1, 1, [HOLE])


def test_one_bad_sample_among_the_first_stops_nothing_but_a_rate_does():
    tally = Tally(0.001)
    tally.add(0, 1, [HOLE])
    for step in range(200):  # at half of the limit
        tally.add(step, 2000, [HOLE])
    assert tally.num_bad == 201
    with pytest.raises(DataError, match="too many"):  # at ten times the limit
        _add_each(tally, 120, num_samples=100)


def _add_each(tally: Tally, steps: int, num_samples: int) -> None:
    for step in range(steps):
        tally.add(step, num_samples, [HOLE])


def test_a_list_goes_on_after_a_restart_and_a_torn_line(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    Tally(0.5, file).list(3, [HOLE, HOLE])
    with file.open("a") as lines:
        lines.write('{"key": "row 2", "rea')
    Tally(0.5, file).list(9, [HOLE, HOLE._replace(key="row 2")])
    kept = [line for line in file.read_text().splitlines() if line.endswith("}")]
    assert [json.loads(line)["step"] for line in kept[:1]] == [3]
    assert "row 2" in kept[-1]


def test_equal_keys_of_two_sources_are_two_holes_and_a_torn_line_spoils_no_other(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_text('{"key": "torn')
    holes = [HOLE._replace(source=source) for source in ("a", "b", "a")]
    Tally(0.9, file).list(0, holes)
    Tally(0.9, file).list(5, holes)
    torn, *lines = file.read_text().splitlines()
    assert torn == '{"key": "torn'
    assert [(json.loads(line)["source"], json.loads(line)["step"]) for line in lines] == [
        ("a", 0),
        ("b", 0),
    ]


def test_a_row_that_was_mended_is_used_again_but_not_by_a_run_that_began_without(
    tmp_path, monkeypatch, tok
):
    rows = [caption(f"good {number}", encoded(number)) for number in range(4)]
    held = Rows(rows)
    monkeypatch.setattr("qwenvl_jax.data.sources.open.open_source", lambda _: held)
    whole = type(held).__getitem__

    def damaged(self, index):
        if index == 2:
            raise DataError("row 2 is damaged")
        return whole(self, index)

    config = data_config(path="any", max_bad_fraction=0.9)

    def first(step, **changes):
        return next(batches(config, 0, step, slots=SLOTS, folder=tmp_path, **changes))

    with monkeypatch.context() as patch:
        patch.setattr(type(held), "__getitem__", damaged)
        first(0)
        assert list(listed(tmp_path)) == ["any[2]"]
        first(1)
    assert UNUSABLE not in sizes_of(held, tok).sizes
    with pytest.raises(ConfigError, match="got 0 now, expected those that its quarantine"):
        first(1)
    first(1, allow_change=("data",))
    first(1)
    assert list(listed(tmp_path)) == ["any[2]"]  # what has been is not taken back


def test_rows_that_an_allowed_change_makes_unusable_are_listed_too(tmp_path, monkeypatch):
    rows = [caption(f"good {number}", encoded(number)) for number in range(4)]
    config = data_config(path="any", max_bad_fraction=0.9)

    def first(step, rows, **changes):
        use(monkeypatch, rows)
        return next(batches(config, 0, step, slots=SLOTS, folder=tmp_path, **changes))

    first(0, [*rows, caption("bad", text="")])
    first(1, [*rows, caption("bad", text=""), caption("worse", text="")], allow_change=("data",))
    first(2, [*rows, caption("bad", text=""), caption("worse", text="")])
    steps = {key: line["step"] for key, line in listed(tmp_path).items()}
    assert steps == {"bad": 0, "worse": 1}


def test_a_list_waits_for_room_on_the_disk(tmp_path, capsys):
    file = tmp_path / "quarantine.jsonl"
    tally = Tally(1.0, file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.open", full)
        tally.add(1, 4, [Hole("a", "picture", "no such file")])
    assert "NOT LISTED in" in capsys.readouterr().err
    tally.add(2, 4, [Hole("b", "picture", "no such file")])
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(hole["key"], hole["step"]) for hole in listed] == [("a", 1), ("b", 2)]
    assert tally.num_bad == 2


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
