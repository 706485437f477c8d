"""A run whose own files are lost, damaged, or met a full disk: refused or mended, and told."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import tiny
from test_training_run import begin, opened

from qwenvl_jax.cli.plot import main as plot_main
from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.holes import Tally
from qwenvl_jax.data.rows import OpenRows
from qwenvl_jax.data.unchanged import KeptData
from qwenvl_jax.files import Lines, appearing
from qwenvl_jax.training.run_dir import open_run, truncate_metrics

NOT_UTF_8 = b'{"step": 1, "loss": 2.0, "name": "\xff"}\n'


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


# --- lost ---------------------------------------------------------------------------------------


def test_a_lost_manifest_loses_no_skips_without_a_word(tmp_path):
    begin(tiny.train_config(tmp_path))
    run_dir = open_run(tiny.train_config(tmp_path), [])
    run_dir.skip((4, 5))
    run_dir.close()
    (tmp_path / "manifest.json").unlink()
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"manifest\.json is missing: .*--allow-change manifest,"):
        opened(tiny.train_config(tmp_path))
    assert files_of(tmp_path) == before
    run_dir = open_run(tiny.train_config(tmp_path, allow_change=("manifest",)), [])
    lost = f"{tmp_path} has lost its manifest.json: steps of earlier --skip-steps are not known"
    assert run_dir.notes[0] == lost
    run_dir.close()


def test_a_lost_data_json_is_written_again_from_the_manifest(tmp_path):
    config = tiny.train_config(tmp_path)
    noted = {"fingerprint": "a" * 64, "unusable": "b" * 64}
    (tmp_path / "data.json").write_text(json.dumps(noted))
    begin(config)
    (tmp_path / "data.json").unlink()
    assert opened(config) == [
        f"{tmp_path / 'data.json'} was lost: written again from manifest.json"
    ]
    assert json.loads((tmp_path / "data.json").read_text()) == noted
    with pytest.raises(ConfigError, match=r"the data are not those that .* was trained with"):
        KeptData(tmp_path, 3).check("c" * 64, {})


@pytest.mark.parametrize("told_by", ["manifest.json", "frozen", "evaluations.jsonl"])
def test_a_run_without_checkpoints_and_metrics_does_not_begin_anew(tmp_path, told_by):
    config = tiny.train_config(tmp_path)
    run_dir = open_run(config, [])
    run_dir.begin()
    run_dir.saved()
    run_dir.close()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    if told_by == "manifest.json":
        run_dir = open_run(config, [])
        with pytest.raises(
            ConfigError, match=r"no checkpoint, but its manifest\.json tells of sav"
        ):
            run_dir.check_new()
        run_dir.close()
        return
    (tmp_path / "manifest.json").unlink()
    opened(config)  # nothing tells of a run
    (tmp_path / "manifest.json").unlink()
    if told_by == "frozen":
        (tmp_path / "frozen" / "0123").mkdir(parents=True)
    else:
        (tmp_path / "evaluations.jsonl").write_text('{"step": 2, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r"holds a run, and its manifest\.json is missing"):
        opened(config)


# --- damaged ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a": "\xff"}'])
@pytest.mark.parametrize("name", ["manifest.json", "config.json", "data.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, text):
    config = tiny.train_config(tmp_path)
    begin(config)
    (tmp_path / name).write_bytes(text)
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path / name} is .*; restore it, (or )?remove it"):
        KeptData(tmp_path, 3) if name == "data.json" else opened(config)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "change",
    [{"skip_steps": [[3]]}, {"starts": [{}]}, {"starts": [{"versions": {}, "inputs": []}]}],
)
def test_a_manifest_with_wrong_parts_is_refused(tmp_path, change):
    begin(tiny.train_config(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ConfigError, match=r"is no manifest of a run: .* pairs of steps; restore"):
        opened(tiny.train_config(tmp_path))


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_lines_that_are_no_text_refuse_a_start_and_stay(tmp_path, name):
    begin(tiny.train_config(tmp_path))
    (tmp_path / name).write_bytes(NOT_UTF_8)
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=rf"{tmp_path / name} is damaged: expected UTF-8.*move"):
        opened(tiny.train_config(tmp_path))
    with pytest.raises(ConfigError, match="expected UTF-8"):
        truncate_metrics(tmp_path / name, 0)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("metrics.jsonl", NOT_UTF_8, "expected UTF-8"),
        ("metrics.jsonl", b"[3]\n", "expected an object in line 2, got '[3]'"),
        ("evaluations.jsonl", NOT_UTF_8, "expected UTF-8"),
        ("evaluations.jsonl", b"7\n", "got '7'"),
    ],
)
def test_curves_of_damaged_lines_are_one_line(tmp_path, capsys, name, line, words):
    good = b'{"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(good + b'{"loss": 3.0}\n')
    assert plot_main([str(tmp_path)]) == 0
    (tmp_path / name).write_bytes(good + line)
    assert plot_main([str(tmp_path)]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / name} is damaged" in told
    assert words in told


def test_a_list_of_unusable_samples_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "quarantine.jsonl"
    file.write_bytes(b'[1]\n7\n{"source": "a", "key": []}\n')
    Tally(1.0, file)
    file.write_bytes(NOT_UTF_8)
    with pytest.raises(ConfigError, match=rf"{file} is damaged: .* a new list begins"):
        Tally(1.0, file)


# --- other data ---------------------------------------------------------------------------------


def kept(folder, first_step, fingerprint, contents, *allowed):
    data = KeptData(folder, first_step, allow_change=allowed)
    data.check(fingerprint, contents)
    data.check_usable(OpenRows({}, None, {}))  # type: ignore[arg-type]


def test_a_setting_that_may_change_lets_no_changed_rows_pass(tmp_path):
    kept(tmp_path, 0, "plan 1", {"a.json": "rows 1", "b.json": "rows 1"})
    changed = {"a.json": "rows 2", "b.json": "rows 1"}
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"a\.json \(was rows 1, now rows 2\); .*data\.content$"):
        kept(tmp_path, 3, "plan 2", changed)
    with pytest.raises(ConfigError, match=r"--allow-change data\.length data\.content$"):
        kept(tmp_path, 3, "plan 2", changed, "data.length")
    assert files_of(tmp_path) == before
    more = {"a.json": "rows 1", "c.json": "rows 1"}
    kept(tmp_path, 3, "plan 2", more, "data.mixture")  # a file of a mixture is a setting
    kept(tmp_path, 3, "plan 3", changed, "data.content")
    with pytest.raises(ConfigError, match=r"--allow-change data$"):
        kept(tmp_path, 3, "plan 4", changed)
    kept(tmp_path, 3, "plan 4", changed, "data.length")


def test_a_run_of_a_version_that_noted_no_contents_asks_for_their_name(tmp_path):
    (tmp_path / "data.json").write_text('{"fingerprint": "plan 1"}')
    kept(tmp_path, 3, "plan 1", {"data.path": "rows 1"})
    (tmp_path / "data.json").write_text('{"fingerprint": "plan 1"}')
    with pytest.raises(ConfigError, match=r"--allow-change data\.length data\.content$"):
        kept(tmp_path, 3, "plan 2", {"data.path": "rows 1"}, "data.length")
    kept(tmp_path, 3, "plan 2", {"data.path": "rows 1"}, "data.length", "data.content")
    assert "rows 1" in (tmp_path / "data.json").read_text()


# --- a full disk --------------------------------------------------------------------------------


def test_a_start_that_a_full_disk_ends_leaves_nothing_half(tmp_path, monkeypatch):
    write, config = Path.write_text, tiny.train_config(tmp_path)

    def no_room_for_the_manifest(path, text, **options):
        return full() if path.name.startswith("manifest") else write(path, text, **options)

    for _ in range(2):  # new, and begun
        before = files_of(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", no_room_for_the_manifest)
            with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/manifest"):
                opened(tiny.train_config(tmp_path, log_every=3))
        assert files_of(tmp_path) == before
        shutil.rmtree(tmp_path)
        begin(config)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    lines = Lines(tmp_path / "metrics.jsonl")
    monkeypatch.setattr("os.write", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'metrics.jsonl'}'"):
        lines.write("{}")
    lines.close()
    with (
        pytest.raises(OSError, match=rf"No space left on device: '{tmp_path / 'page'}'"),
        appearing(tmp_path / "page"),
    ):
        full()
