"""Batches of finite sources: each sample once, the same for any hosts, workers and restarts."""

import dataclasses
import itertools
import json
import subprocess
import sys
import time
from subprocess import run

import numpy as np
import pytest
from finetune_rows import NANO, SLOTS, Rows, data_config, numbers_in, same, write_rows

from qwenvl_jax.config import NO_IMAGE, ConfigError
from qwenvl_jax.data.example import Batch, DataError
from qwenvl_jax.data.pipeline import Share, batches
from qwenvl_jax.data.record import Record
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO, slots=SLOTS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def take(config, count: int, first: int = 0, seed: int = 5, **options) -> list[Batch]:
    return list(itertools.islice(batches(config, seed, first, slots=SLOTS, **options), count))


def test_an_epoch_holds_each_row_once_with_its_own_picture(tmp_path, tok):
    config = data_config(path=write_rows(tmp_path, 61))
    source = batches(config, 5, slots=SLOTS)
    assert source.repeats is not None
    whole, rest = divmod(source.repeats.num_rows, config.rows)
    found = [
        number for batch in itertools.islice(source, whole) for number in numbers_in(batch, tok)
    ]
    last = next(source)
    parts = [Batch(*(array[:rest] for array in last)), Batch(*(array[rest:] for array in last))]
    found += numbers_in(parts[0], tok)
    assert sorted(found) == list(range(61))
    assert numbers_in(parts[1], tok)  # the next epoch begins in the same batch
    for b, row in enumerate(last.image_start):
        for image, start in zip(last.images[b], row, strict=True):
            if start == NO_IMAGE:
                assert not image.any()
            else:
                sample = last.segment[b] == last.segment[b, start]
                text = tok.decode(last.tokens[b, sample])
                number = int(text.rsplit("number ", 1)[1].split("<|im_end|>")[0])
                assert image[5, 5].tolist() == [number, 0, 77]


def test_resuming_far_ahead_gives_the_batches_of_an_uninterrupted_run(tmp_path):
    config = data_config(path=write_rows(tmp_path, 40), vary_pictures=0.3)
    stream = take(config, 6)
    assert all(same(a, b) for a, b in zip(stream[4:], take(config, 2, first=4), strict=True))
    assert take(config, 1, first=10**6)[0].tokens.shape == stream[0].tokens.shape
    assert not same(stream[0], take(config, 1, seed=6)[0])


def test_hosts_make_their_rows_of_the_same_batches(tmp_path):
    config = data_config(path=write_rows(tmp_path, 40), vary_pictures=0.3)
    whole = take(config, 3)
    for hosts in (1, 2, 4):
        each = config.rows // hosts
        parts = [
            take(config, 3, share=Share(range(host * each, (host + 1) * each), host))
            for host in range(hosts)
        ]
        for step in range(3):
            together = [
                np.concatenate(arrays)
                for arrays in zip(*(part[step] for part in parts), strict=True)
            ]
            assert same(together, whole[step]), (hosts, step)


def test_hosts_share_generated_scenes_too():
    config = dataclasses.replace(
        data_config(), source="scenes", tasks={"caption": 1.0, "text": 1.0}
    )
    (whole,), (part,) = take(config, 1), take(config, 1, share=Share([1, 3]))
    assert same([array[[1, 3]] for array in whole], part)


def test_workers_make_the_same_batches(tmp_path):
    config = data_config(path=write_rows(tmp_path, 40), vary_pictures=0.3)
    # In a process of its own: grain's workers start from a fresh interpreter.
    script = f"""
import dataclasses, hashlib, itertools, sys
from qwenvl_jax.config import DataConfig
from qwenvl_jax.data.pipeline import batches
if __name__ == "__main__":
    config = {config!r}
    for workers in (0, 2, 4):
        made = batches(dataclasses.replace(config, num_workers=workers), 5, 1, slots={SLOTS})
        digest = hashlib.sha256()
        kept = [*itertools.islice(made, 5)]  # together: none may lose its pictures to a later one
        for batch in kept:
            for array in batch:
                digest.update(array.tobytes())
        print(workers, digest.hexdigest(), made.metrics(5)["samples"])
    sys.stdout.flush()
"""
    command = [sys.executable, "-c", script]
    ended = run(command, capture_output=True, text=True, timeout=170, check=True)
    lines = [line.split() for line in ended.stdout.splitlines()]
    assert [line[0] for line in lines] == ["0", "2", "4"]
    assert lines[0][1:] == lines[1][1:] == lines[2][1:]


def test_pictures_vary_each_time_they_are_met_and_nothing_else_does(tmp_path):
    path = write_rows(tmp_path, 4)  # a few, so that a batch shows each several times
    plain, varied = (
        take(data_config(path=path, vary_pictures=strength), 1)[0] for strength in (0.0, 0.4)
    )
    assert same([*plain[:5], plain.image_start], [*varied[:5], varied.image_start])
    is_shown = plain.image_start != NO_IMAGE
    before, after = plain.images[is_shown], varied.images[is_shown]
    change = np.abs(before.astype(int) - after).mean((1, 2, 3))
    assert np.all(change < 0.4 * 255)
    assert np.mean(change > 1) > 0.8
    assert len({picture.tobytes() for picture in before}) == 2
    assert len({picture.tobytes() for picture in after}) > 2
    assert not varied.images[~is_shown].any()


def test_metrics_say_what_a_step_holds(tmp_path, tok):
    config = data_config(path=write_rows(tmp_path, 40))
    source = batches(config, 5, 3, slots=SLOTS)
    batch = next(source)
    assert source.metrics(3) == {
        "samples": len(numbers_in(batch, tok)),
        "fill": pytest.approx(np.mean(batch.segment > 0), abs=1e-4),
        "image_fill": pytest.approx(np.mean(batch.image_start != NO_IMAGE), abs=1e-4),
        "bad_samples": 0,
    }
    assert source.metrics(4) == {}
    samples = source.samples(3)
    assert list(samples) == list(range(config.rows))
    assert sum(map(len, samples.values())) == source.metrics(3)["samples"]
    assert all("rows.json[" in key for keys in samples.values() for key in keys)
    assert source.samples(4) == {}
    held = batches(config, 5, 3, slots=SLOTS, share=Share((1, 3), 1))
    next(held)
    assert held.samples(3) == {1: samples[1], 3: samples[3]}


def test_a_mixture_follows_its_weights(tmp_path, tok):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = write_rows(tmp_path / "a", 30)
    other = write_rows(tmp_path / "b", 50, first=1000)
    config = data_config(mixture={one: 3.0, other: 1.0})
    source = batches(config, 0, slots=SLOTS)
    # 26 times the 30 rows that are used up first make a round of more than 1024 samples.
    assert source.repeats is not None
    assert source.repeats.passes == {one: 26.0, other: 5.2}
    found = []
    while len(found) < 400:
        found += numbers_in(next(source), tok)
    assert np.mean(np.array(found) < 1000) == pytest.approx(0.75, abs=0.08)
    assert len({number for number in found if number < 1000}) == 30


def test_fewer_samples_than_rows_of_a_batch(tmp_path, tok):
    batch = take(data_config(path=write_rows(tmp_path, 1)), 1)[0]
    assert numbers_in(batch, tok) == [0] * 4
    batch = take(data_config(path=write_rows(tmp_path, 3), rows=16), 1)[0]
    assert set(numbers_in(batch, tok)) == {0, 1, 2}


def test_rows_of_one_task(monkeypatch, tok):
    texts = [Record(f"t{i}", "text", {"text": "a star " * (i % 5 + 1)}) for i in range(20)]
    asked = [Record(f"q{i}", "vqa", {"question": "why", "answer": "so"}) for i in range(20)]
    source = Rows([row for pair in zip(texts, asked, strict=True) for row in pair])
    monkeypatch.setattr("qwenvl_jax.data.sources.open.open_source", lambda _: source)
    kinds = {}
    for same_task in (False, True):
        config = data_config(path="any", same_task_rows=same_task)
        rows = [tok.decode(row) for batch in take(config, 4) for row in batch.tokens]
        kinds[same_task] = {("Answer" in row, "star" in row) for row in rows}
    assert (True, True) in kinds[False]
    assert kinds[True] == {(True, False), (False, True)}


def test_samples_may_see_those_before_them(tmp_path):
    apart = take(data_config(path=write_rows(tmp_path, 20)), 1)[0]
    across = take(data_config(path=str(tmp_path / "rows.json"), attend_across=True), 1)[0]
    assert same(
        (apart.tokens, apart.targets, apart.loss_weight, apart.images),
        (across.tokens, across.targets, across.loss_weight, across.images),
    )
    assert np.array_equal(across.segment, apart.segment > 0)
    for row in range(4):
        used = np.flatnonzero(across.segment[row])
        assert across.position[row, used].tolist() == list(range(len(used)))


# --- data that change ----------------------------------------------------------------------------


def test_changed_data_are_noticed_when_a_run_goes_on(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = data_config(path=write_rows(tmp_path, 12))
    take(config, 1, folder=run_dir)
    assert take(config, 1, first=2, folder=run_dir)
    for other in (
        dataclasses.replace(config, length=159),
        dataclasses.replace(config, mask="assistant_only"),
        data_config(path=write_rows(tmp_path, 13, "more.json")),
    ):
        with pytest.raises(ConfigError, match=r"the data are not those .*choose another run_dir"):
            take(other, 1, first=2, folder=run_dir)
    moved = tmp_path / "moved"
    moved.mkdir()
    assert take(data_config(path=write_rows(moved, 12)), 1, first=2, folder=run_dir)
    changed = dataclasses.replace(config, length=159)
    assert take(changed, 1, first=2, folder=run_dir, allow_change=("data",))
    assert take(changed, 1, first=2, folder=run_dir)  # it is the run's from now on
    with pytest.raises(ConfigError, match=r"--allow-change data$"):
        take(config, 1, first=2, folder=run_dir)


def test_a_setting_that_may_change_lets_no_changed_file_pass(tmp_path):
    config = data_config(path=write_rows(tmp_path, 12), cut_turns=True)
    take(config, 1, folder=tmp_path)
    shorter = dataclasses.replace(config, length=159)
    more = dataclasses.replace(shorter, path=write_rows(tmp_path, 13, "more.json"))
    with pytest.raises(ConfigError, match=r"rows, .*--allow-change data\.length data\.content$"):
        take(more, 1, first=2, folder=tmp_path, allow_change=("data.length",))
    assert take(shorter, 1, first=2, folder=tmp_path, allow_change=("data.length",))
    assert take(more, 1, first=2, folder=tmp_path, allow_change=("data.content",))


def test_sizes_are_measured_once(tmp_path, monkeypatch):
    path = write_rows(tmp_path, 12)
    first = take(data_config(path=path), 1)[0]
    monkeypatch.setattr("qwenvl_jax.data.sizes.measure", lambda *_: pytest.fail("measured again"))
    assert same(first, take(data_config(path=path), 1)[0])
    monkeypatch.undo()
    (kept,) = (tmp_path / "cache" / "qwenvl_jax" / "sizes").iterdir()
    kept.write_bytes(b"PK damaged")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert same(first, take(data_config(path=path), 1)[0])


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, r"needs data\.path or data\.mixture"),
        ({"mixture": {"a": 1.0}}, r"needs data\.path or data\.mixture, one of them"),
        ({"tasks": {"chat": 1.0}}, r"data\.tasks has no effect"),
        ({"mixing": "counts"}, r"data\.mixing has no effect"),
        ({"path": "", "mixture": {"a": 1.0}, "temperature": 2.0}, r"data\.temperature has no"),
        ({"source": "scenes", "tasks": {"chat": 1.0}}, r"data\.path has no effect"),
        (
            {"source": "scenes", "path": "", "tasks": {"chat": 1.0}, "max_bad_fraction": 0.5},
            r"data\.max_bad_fraction has no effect",
        ),
        ({"source": "scenes", "path": ""}, r"data\.tasks is empty"),
        ({"max_bad_fraction": 2.0}, r"max_bad_fraction must lie in 0\.\.1"),
        ({"num_workers": -1}, r"must not be negative"),
        ({"path": "", "mixture": {"a": 0.0}}, r"mixture must have positive weights"),
    ],
)
def test_settings_that_would_do_nothing_or_harm(changes, message):
    with pytest.raises(ConfigError, match=message):
        take(data_config(**({"path": "rows.json"} | changes)), 1)


def test_held_out_rows_are_another_path(tmp_path):
    with pytest.raises(ConfigError, match="has no part 'heldout'"):
        batches(data_config(path=write_rows(tmp_path, 2)), 0, slots=SLOTS, split="heldout")


def test_long_dialogues_lose_their_last_turns_where_that_is_asked_for(tmp_path, tok):
    turns = []
    for number in range(6):
        turns.append({"from": "user", "value": "Which one? " + "It is. " * 6})
        turns.append({"from": "assistant", "value": f"number {number}"})
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"id": "long", "conversations": turns}]), encoding="utf-8")
    config = data_config(path=str(path), cut_turns=True)
    (batch,) = take(config, 1)
    text = tok.decode(batch.tokens[0][batch.segment[0] == 1])
    assert "number 0" in text
    assert "number 5" not in text
    assert text.endswith("<|im_end|>\n")
    with pytest.raises(DataError, match=r"long.* does not fit into a row"):
        take(dataclasses.replace(config, cut_turns=False), 1)
    with pytest.raises(DataError, match="answer alone do not fit into 40"):
        take(dataclasses.replace(config, length=40), 1)


WORKER = """
import multiprocessing, time
from qwenvl_jax.data.pipeline import _obey_the_parent

def work():
    _obey_the_parent(0, 1)
    print("works", flush=True)
    time.sleep(100)

multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(100)
"""


def test_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE)
    assert parent.stdout.readline() == b"works\n"
    parent.kill()
    parent.wait()
    began = time.monotonic()
    assert parent.stdout.read() == b""  # the worker held the other end
    assert time.monotonic() - began < 50
    parent.stdout.close()
