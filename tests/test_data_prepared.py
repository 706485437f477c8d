"""Preparation of rows: what is written, what survives a kill, and what damage is noticed."""

import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from prepared_rows import Pairs, picture, plan

import qwenvl_jax
from qwenvl_jax.cli.data import main
from qwenvl_jax.data.example import DataError
from qwenvl_jax.data.prepare import Progress, prepare, processes
from qwenvl_jax.data.record import FIELDS, Record
from qwenvl_jax.data.shard import Plan, PrepareError
from qwenvl_jax.data.sizes import measure, sizes_of
from qwenvl_jax.data.sources.eval_files import EvalFile
from qwenvl_jax.data.sources.prepared import Prepared
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.prompt.tokenizer import load_tokenizer

NANO = Path(qwenvl_jax.__file__).parent / "assets" / "nano"
HERE = Path(__file__).parent


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "rows"
    prepare(plan(folder, Pairs(), tokenizer=NANO), processes(1))
    return folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    target = tmp_path / "copy"
    target.mkdir()
    for name, data in files_of(folder).items():
        (target / name).write_bytes(data)
    return target


def run_script(*words, **options) -> subprocess.CompletedProcess:
    run = [sys.executable, str(HERE / "prepared_rows.py"), *map(str, words)]
    environment = {"PYTHONPATH": f"{HERE}:{HERE.parent}", "PATH": ""}
    return subprocess.run(
        run, check=False, capture_output=True, text=True, env=environment, timeout=120, **options
    )


def test_rows_come_back_in_order(folder):
    rows = Prepared(folder)
    kept = [i for i in range(40) if i not in (7, 11)]
    assert len(rows) == 38
    assert [rows[i].key for i in range(38)] == [f"pairs/{i}" for i in kept]
    assert rows[37] == Pairs()[39]
    assert pickle.loads(pickle.dumps(rows))[20] == rows[20]
    with pytest.raises(IndexError, match="row 38 is not there"):
        rows[38]


def test_sizes_are_those_of_the_samples(folder):
    rows, tokenizer = Prepared(folder), load_tokenizer(NANO, slots=9)
    examples = [example_of(rows[i], tokenizer) for i in range(38)]
    expected = [[len(e.ids) - 9 * len(e.images), len(e.images)] for e in examples]
    sizes = rows.sizes(tokenizer)
    assert sizes is not None
    assert sizes.dtype == np.int32
    assert sizes.tolist() == expected
    assert rows.picture_sizes()[:3].tolist() == [[80, 70], [90, 70], [100, 70]]
    assert len(rows.row_bytes()) == 38
    assert {list(FIELDS)[place] for place in rows.tasks()} == {"caption"}
    known = sizes_of(rows, tokenizer, with_tasks=True)
    assert known.sizes.tolist() == expected
    assert known.tasks.tolist() == measure(rows, tokenizer).tasks.tolist()
    other = type(tokenizer)({bytes([b]): b for b in range(256)}, slots=9)
    assert rows.sizes(other) is None


def test_index_counts_and_refused_rows_are_listed(folder):
    index = json.loads((folder / "index.json").read_text())
    assert index["rows"] == 38
    assert index["read"] == 40
    assert index["tasks"] == {"caption": 38}
    assert index["refused"] == {"does not fit its task": 1, "unreadable row": 1}
    refused = [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]
    assert [line["key"] for line in refused] == ["#7", "pairs/11"]
    assert "never written" in refused[0]["detail"]
    names = {p.name for p in folder.iterdir()}
    assert not names & {"parts", "plan.json"}
    assert not [name for name in names if name.endswith(".new")]


def test_processes_write_the_same_bytes(folder, tmp_path):
    seen: list[Progress] = []
    prepare(plan(tmp_path / "out", Pairs(), tokenizer=NANO), processes(2), seen.append)
    assert files_of(tmp_path / "out") == files_of(folder)
    assert seen[-1] == Progress(4, 4, 38, 2)


@pytest.mark.parametrize(("victim", "num_workers"), [("self", 1), ("parent", 2)])
def test_a_killed_preparation_goes_on_where_it_was(victim, num_workers, tmp_path):
    fault, out, whole = tmp_path / "fault", tmp_path / "out", tmp_path / "whole"
    fault.write_text(victim)
    done = run_script(out, fault, num_workers)  # returns when the last process has gone
    assert done.returncode == -9
    assert not (out / "index.json").exists()
    facts = [json.loads(path.read_text()) for path in (out / "parts").glob("*.json")]
    before = {out / shard["file"]: (out / shard["file"]).stat().st_mtime_ns for shard in facts}
    fault.unlink()
    prepare(plan(out, Pairs(fault=fault)), processes(1))
    prepare(plan(whole, Pairs(fault=fault)), processes(1))
    assert files_of(out) == files_of(whole)
    assert before
    assert {p: p.stat().st_mtime_ns for p in before} == before  # not written again


def test_a_killed_worker_is_told(tmp_path):
    (tmp_path / "fault").write_text("self")
    done = run_script(tmp_path / "out", tmp_path / "fault", 2)
    assert done.returncode == 1
    assert "PrepareError: a worker process was killed" in done.stderr


def test_a_full_disk_is_told(tmp_path):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = run_script(tmp_path / "out", tmp_path / "none", 1, preexec_fn=small_files)
    assert "PrepareError" in done.stderr.splitlines()[-1]
    assert "make room, and run the same command" in done.stderr.splitlines()[-1]
    assert not [*(tmp_path / "out").glob("rows-*")]


def test_the_same_command_again_has_nothing_to_do(copy):
    before = files_of(copy)
    index = prepare(plan(copy, Pairs(), tokenizer=NANO), processes(1))
    assert index["rows"] == 38
    assert files_of(copy) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": Pairs(fingerprint="changed")}, "begun from another source, or the source has"),
        ({"rules": ("web",)}, r"begun with other settings: its rules was \[\], now \['clip"),
        ({"tokenizer": None}, "its tokenizer was"),
        ({"source": Pairs(39)}, "begun with another --limit or --rows-per-shard"),
    ],
)
def test_another_preparation_into_the_folder_is_refused(copy, change, message):
    settings = {"tokenizer": NANO, "source": Pairs()} | change
    with pytest.raises(PrepareError, match=message):
        prepare(plan(copy, **settings), processes(1))


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(PrepareError, match=r"holds something else: got thesis\.tex"):
        prepare(plan(tmp_path, Pairs()), processes(1))
    assert files_of(tmp_path) == {"thesis.tex": b"dear"}


def test_a_run_killed_before_it_had_a_plan_goes_on(folder, tmp_path):
    (tmp_path / "out" / "parts").mkdir(parents=True)
    (tmp_path / "out" / "plan.json.7.new").write_text("{")
    prepare(plan(tmp_path / "out", Pairs(), tokenizer=NANO), processes(1))
    assert files_of(tmp_path / "out") == files_of(folder)


def test_pictures_of_another_folder_are_another_preparation(tmp_path):
    file = tmp_path / "my.jsonl"
    file.write_text('{"image": "a.png", "question": "What?", "answer": "red"}\n')
    for colour in ("red", "blue"):
        (tmp_path / colour).mkdir()
        Image.new("RGB", (40, 40), colour).save(tmp_path / colour / "a.png")
    out = tmp_path / "out"
    command = ["prepare", str(file), str(out), "--pictures"]
    assert main([*command, str(tmp_path / "red")]) == 0
    assert main([*command, str(tmp_path / "red")]) == 0
    with pytest.raises(PrepareError, match=r"pictures of another folder \(--pictures\)"):
        prepare(Plan(stream=EvalFile(file, tmp_path / "blue"), folder=out), processes(1))
    index = json.loads((out / "index.json").read_text())
    del index["made_from"]["pictures"]  # as an older version wrote it
    (out / "index.json").write_text(json.dumps(index))
    assert main([*command, str(tmp_path / "red")]) == 0


def test_a_row_whose_picture_is_missing_is_refused_for_it(tmp_path):
    file, out = tmp_path / "my.jsonl", tmp_path / "out"
    lines = [{"image": f"{name}.png", "question": "What?", "answer": "red"} for name in "ab"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    assert main(["prepare", str(file), str(out)]) == 0
    (refused,) = [json.loads(line) for line in (out / "refused.jsonl").read_text().splitlines()]
    assert refused["reason"] == "picture"
    assert f"No such file or directory: '{tmp_path / 'b.png'}'" in refused["detail"]


def test_two_at_once_are_refused(tmp_path):
    def engine(first, jobs):
        with pytest.raises(PrepareError, match="prepared by another process"):
            prepare(first, processes(1))
        return processes(1)(first, jobs)

    assert prepare(plan(tmp_path / "out", Pairs()), engine)["rows"] == 38


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path):
    class Changing:
        def __init__(self):
            self.times = 0

        @property
        def fingerprint(self):
            self.times += 1
            return f"seen {self.times} times"

        def shards(self):
            return ["a"]

        def read(self, shard):
            yield Record("r", "text", {"text": "hello"})

    settings = plan(tmp_path / "out", Pairs())
    object.__setattr__(settings, "stream", Changing())
    with pytest.raises(PrepareError, match="the source changed while"):
        prepare(settings, processes(1))


def test_nothing_kept_is_an_error(tmp_path):
    class Nothing(Pairs):
        def __getitem__(self, index):
            return Record(f"r/{index}", "caption", {"text": "a b", "language": "en"}, (b"<html>",))

    with pytest.raises(PrepareError, match="no row of 3 was kept: 3 picture"):
        prepare(plan(tmp_path / "out", Nothing(3)), processes(1))


# --- damage ---------------------------------------------------------------------------------------


def test_files_are_compared_with_the_index_at_opening(copy):
    first, second, third, _ = sorted(copy.glob("*.array_record"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1])
    third.rename(third.with_name("rows-7.array_record"))
    next(copy.glob("*.npz")).unlink()
    with pytest.raises(DataError) as caught:
        Prepared(copy)
    told = str(caught.value)
    assert f"{first.name} is missing" in told
    assert f"{second.name} has" in told
    assert "rows-7.array_record is not in index.json" in told
    assert ".sizes.npz is missing" in told


def test_a_flipped_bit_costs_one_row(copy):
    path = sorted(copy.glob("*.array_record"))[1]
    data = bytearray(path.read_bytes())
    image = Pairs()[13].images[0]
    assert isinstance(image, bytes)
    place = data.find(image[-60:-20])
    assert place > 0, "pictures are stored as they are"
    data[place] ^= 1
    path.write_bytes(data)
    rows = Prepared(copy)
    for _ in range(2):  # the reader still works after it has met the damage
        for i in set(range(38)) - {11}:
            assert rows[i].key.startswith("pairs/")
        with pytest.raises(DataError, match=f"{path.name}#2 of .* cannot be read"):
            rows[11]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no index.json"), ("{", "cannot be read"), ('{"format": 9}', "another format: got 9")],
)
def test_a_wrong_index_is_told(content, message, tmp_path):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Prepared(tmp_path)


def test_sizes_of_other_rows_are_told(copy):
    first, _, third, _ = sorted(copy.glob("*.npz"))
    first.write_bytes(third.read_bytes())
    with pytest.raises(DataError, match="belongs to other rows: got 10 rows, expected 9"):
        Prepared(copy).row_bytes()
    first.write_bytes(b"PK")
    with pytest.raises(DataError, match="is damaged"):
        Prepared(copy).row_bytes()


def test_grain_reads_prepared_rows(folder):
    import grain

    source = grain.MapDataset.source(Prepared(folder)).map(lambda row: row.key)
    assert source[5] == "pairs/5"
    assert picture(80, 70, 0) == Prepared(folder)[0].images[0]
