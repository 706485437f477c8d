"""Our weights folder: plain Orbax inside, damage found by name; and the convert command."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from released_files import golden_tensors, read_all, write_folder

from qwenvl_jax.checkpoint.leaves import (
    CHUNK_BYTES,
    Leaf,
    chunk_shape,
    digest_leaf,
    disk_bytes,
    open_leaf,
    unwatched,
    write_leaf,
)
from qwenvl_jax.checkpoint.store import CheckpointStore
from qwenvl_jax.checkpoint.weights import (
    WeightsError,
    fill,
    load_weights_folder,
    new_folder,
    open_weights,
    read_weights_config,
    save_weights,
    verify_weights,
)
from qwenvl_jax.cli.convert import main, num_bytes
from qwenvl_jax.config import ConfigError, MeshConfig, to_dict
from qwenvl_jax.conversion.load import load_weights, read_config
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.sharding import make_mesh, named_variables

CONVERT = Path(__file__).resolve().parents[1] / "convert.py"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder saved from a model in memory, and its arrays by path."""
    config, random = tiny.model_config(), np.random.default_rng(4)
    _, abstract = abstract_state(config, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    wanted = {path: x.get_value() for path, x in named_variables(abstract).items()}
    arrays = {path: random.normal(size=x.shape).astype("f4") for path, x in wanted.items()}
    placed = {path: jax.device_put(x, wanted[path].sharding) for path, x in arrays.items()}
    folder = tmp_path_factory.mktemp("saved") / "ours"
    save_weights(folder, config, fill(abstract, placed))
    return folder, arrays


def copy_of(folder: Path, target: Path) -> Path:
    for file in folder.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(file.read_bytes())
    return target


def test_a_saved_model_comes_back_from_disk(saved):
    folder, arrays = saved
    assert read_weights_config(folder) == tiny.model_config()
    _, abstract = abstract_state(tiny.model_config())
    loaded = named_variables(load_weights_folder(folder, abstract))
    assert loaded.keys() == arrays.keys()
    for path, variable in loaded.items():
        np.testing.assert_array_equal(variable.get_value(), arrays[path])
        assert isinstance(variable.get_value(), jax.Array)


def test_plain_orbax_restores_the_folder(saved):
    folder, arrays = saved
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    _, abstract = abstract_state(tiny.model_config(), mesh)
    target = {path: x.get_value() for path, x in named_variables(abstract).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        plain = checkpointer.restore(folder / "weights")
        placed = checkpointer.restore(folder / "weights", target)
    for path, array in arrays.items():
        np.testing.assert_array_equal(plain[path], array)
        np.testing.assert_array_equal(placed[path], array)
        assert placed[path].sharding == target[path].sharding


PART = "decoder.blocks.attn.q_proj.kernel"


def flip_a_bit(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)


@pytest.mark.parametrize(
    "damage",
    [flip_a_bit, Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1])],
    ids=["a flipped bit", "a lost file", "a cut file"],
)
def test_damaged_arrays_are_all_named(saved, tmp_path, damage):
    folder = copy_of(saved[0], tmp_path / "ours")
    for path in (PART, "vit.ln_pre.scale"):
        (chunk,) = [f for f in (folder / "weights" / path).iterdir() if f.name[0].isdigit()]
        damage(chunk)
    _, abstract = abstract_state(tiny.model_config())
    with pytest.raises(WeightsError, match="is damaged") as caught:
        load_weights_folder(folder, abstract)
    named = [path for path in saved[1] if f"{path}:" in str(caught.value)]
    assert sorted(named) == sorted([PART, "vit.ln_pre.scale"])


def test_a_lost_or_strange_file_of_the_folder_is_named(saved, tmp_path):
    folder = copy_of(saved[0], tmp_path / "ours")
    (folder / "weights" / PART / ".zarray").unlink()
    with pytest.raises(WeightsError, match=PART):
        open_weights(folder)
    (folder / "weights.json").write_text(json.dumps({"format": 2, "arrays": {}}))
    with pytest.raises(WeightsError, match="has format 2, expected 1"):
        verify_weights(folder)
    (folder / "weights.json").write_text("{")
    with pytest.raises(WeightsError, match="is not JSON"):
        verify_weights(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="does not describe a model: no VisionConfig"):
        read_weights_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match="is missing"):
        read_weights_config(folder)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {"dtype": "float32", "sha256": "0"},
        {"shape": [2], "sha256": "0"},
        {"shape": [2], "dtype": "float32"},
        {"shape": ["2"], "dtype": "float32", "sha256": "0"},
        {"shape": [2], "dtype": "float", "sha256": "0"},
    ],
)
def test_a_manifest_that_is_damaged_is_told(saved, tmp_path, entry):
    folder = copy_of(saved[0], tmp_path / "ours")
    manifest = {"format": 1, "arrays": {PART: entry}}
    for arrays in (manifest["arrays"], [], None):
        (folder / "weights.json").write_text(json.dumps(manifest | {"arrays": arrays}))
        with pytest.raises(WeightsError, match=r"weights\.json is damaged: expected a shape"):
            verify_weights(folder)
    deep = "[" * 100_000
    (folder / "weights.json").write_text(deep)
    with pytest.raises(WeightsError, match="is not JSON"):
        open_weights(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora": None}, "no LoraConfig in it"),
        ({"lora": []}, "no LoraConfig in it"),
        ({"image_size": 28.0}, r"ModelConfig\.image_size must be a whole number: got 28\.0"),
        ({"image_size": 0}, r"ModelConfig\.image_size must be positive"),
        ({"dtype": "half"}, r"ModelConfig\.dtype must be one of 'float32', 'bfloat16': got 'half'"),
    ],
)
def test_a_config_that_is_damaged_is_told(saved, tmp_path, change, said):
    folder = copy_of(saved[0], tmp_path / "ours")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(WeightsError, match=f"does not describe a model: .*{said}"):
        read_weights_config(folder)


def test_large_arrays_are_read_some_at_a_time(saved, monkeypatch):
    """What is read at once is held twice by Orbax."""
    monkeypatch.setattr("qwenvl_jax.checkpoint.parts._READ_BYTES", 20_000)
    restore, sizes = ocp.Checkpointer.restore, []

    def watched(self, folder, args):
        sizes.append([x.size * x.dtype.itemsize for x in args.item.values()])
        return restore(self, folder, args=args)

    monkeypatch.setattr(ocp.Checkpointer, "restore", watched)
    _, abstract = abstract_state(tiny.model_config())
    loaded = load_weights_folder(saved[0], abstract)
    for path, variable in named_variables(loaded).items():
        np.testing.assert_array_equal(variable.get_value(), saved[1][path], err_msg=path)
    assert len(sizes) > 2
    assert all(len(part) == 1 or sum(part) <= 20_000 for part in sizes)
    assert max(sizes[0]) == max(x.nbytes for x in saved[1].values())


def test_parts_of_several_dtypes_leave_as_the_one_that_holds_all(tmp_path):
    """As of a run that trains q_proj in float32 and keeps the rest in bfloat16."""
    released = write_folder(tmp_path / "released", golden_tensors())
    assert main(["import", str(released), str(tmp_path / "ours")]) == 0
    config = read_config(tmp_path / "ours")
    _, abstract = abstract_state(config)
    mixed = {
        path: variable.get_value().astype("f4" if path.startswith(PART[:-7]) else jnp.bfloat16)
        for path, variable in named_variables(load_weights(tmp_path / "ours", abstract)).items()
    }
    save_weights(tmp_path / "mixed", config, fill(abstract, mixed))
    assert main(["export", str(tmp_path / "mixed"), str(tmp_path / "back")]) == 0
    tensors = read_all(tmp_path / "back")
    for name, expected in golden_tensors().items():
        is_mixed = ".attn.c_attn." in name
        assert tensors[name].dtype == (np.float32 if is_mixed else jnp.bfloat16), name
        rounded = expected.astype(jnp.bfloat16).astype(np.float32)
        np.testing.assert_allclose(tensors[name].astype(np.float32), rounded, rtol=8e-3, atol=1e-6)


def test_folders_that_were_made_go_with_a_conversion_that_fails(tmp_path, capsys):
    (tmp_path / "W").mkdir()
    left = tmp_path / "W" / ".dst.partial-killed"
    left.mkdir()
    assert main(["import", str(tmp_path / "none"), str(tmp_path / "W" / "a" / "b" / "dst")]) == 2
    with pytest.raises(RuntimeError), new_folder(tmp_path / "W" / "a" / "b" / "dst"):
        raise RuntimeError
    assert list((tmp_path / "W").iterdir()) == [left]
    with new_folder(tmp_path / "W" / "dst"):
        pass
    assert f"{left} is of a conversion that was killed" in capsys.readouterr().err


def test_another_models_folder_is_refused_by_shape(saved):
    decoder = dataclasses.replace(tiny.model_config().decoder, mlp_dim=48)
    _, abstract = abstract_state(tiny.model_config(decoder=decoder))
    with pytest.raises(WeightsError, match=r"gate_proj\.kernel is misshapen: got \(2, 32, 40\)"):
        load_weights_folder(saved[0], abstract)


def test_big_arrays_lie_in_chunks_that_a_device_can_take(tmp_path):
    shape = (3, 1301, 7, 131)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    directory = tmp_path / "x"
    digest = write_leaf(directory, Leaf(shape, array.dtype, array.__getitem__), unwatched)
    leaf = open_leaf(directory, shape, "float32")
    np.testing.assert_array_equal(leaf.read((slice(None),)), array)
    assert digest_leaf(leaf, unwatched) == digest
    chunk = chunk_shape(shape, 4)
    assert chunk[0] == 1
    files = [f for f in directory.iterdir() if f.name[0].isdigit()]
    assert len(files) == np.prod([-(-n // c) for n, c in zip(shape, chunk, strict=True)]) > 3
    assert max(file.stat().st_size for file in files) <= CHUNK_BYTES
    taken = sum(-(-file.stat().st_size // 4096) * 4096 for file in directory.iterdir())
    assert disk_bytes(leaf) == taken > leaf.num_bytes, "the last chunks are whole too"
    with pytest.raises(ValueError, match="expected float32"):
        open_leaf(directory, (3, 1301), "float32")


# --- a run's checkpoint ---------------------------------------------------------------------------


@pytest.mark.timeout(400)  # the digests of all arrays are compiled twice
def test_a_run_becomes_a_folder_for_inference(saved, tmp_path):
    run, arrays = tmp_path / "run", saved[1]
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(tiny.train_config(run))))
    store = CheckpointStore(run)
    store.save(4, {"weights": {path: jax.numpy.asarray(x) for path, x in arrays.items()}})
    store.wait()
    store.close()
    assert read_config(run) == tiny.model_config()
    _, abstract = abstract_state(tiny.model_config(param_dtype="bfloat16"))
    loaded = named_variables(load_weights(run, abstract))
    kernel = loaded["decoder.lm_head.kernel"].get_value()
    np.testing.assert_array_equal(kernel, arrays["decoder.lm_head.kernel"].astype("bfloat16"))
    assert main(["import", str(run), str(tmp_path / "ours")]) == 0
    manifests = [
        json.loads((f / "weights.json").read_text()) for f in (tmp_path / "ours", saved[0])
    ]
    assert manifests[0] == manifests[1]


# --- the command ----------------------------------------------------------------------------------


def test_the_command_converts_both_ways(tmp_path, capsys):
    released = write_folder(tmp_path / "released", golden_tensors())
    ours, again = tmp_path / "ours", tmp_path / "again"
    assert main(["import", str(released), str(ours)]) == 0
    assert main(["export", str(ours), str(again), "--shard-size", "1MB"]) == 0
    out = capsys.readouterr()
    assert out.out.splitlines() == [f"{ours}: 2 + 2 layers, ready", f"{again}: 4 files, ready"]
    assert "import: 3 of 3 MB" in out.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["import", "none", "ours"], "the folder itself is missing"),
        (["import", "one"], "import takes SRC and DST: got 1 folder"),
        (["import", "--vit", "a", "ours"], "--vit and --llm go together"),
        (
            ["import", "none", "ours", "--seed", "0"],
            "new adapter of --vit and --llm takes --seed: got SRC",
        ),
        (
            ["import", "a", "b", "--num-queries", "64", "--seed", "5"],
            "takes --num-queries and --seed",
        ),
        (["export", "none", "x"], "no weights.json"),
        (["export", "none", "x", "--shard-size", "2 gigs"], "a size is a whole number"),
        (
            ["export", "none", "x", "--dtype", "fp16"],
            "--dtype takes one of keep, bfloat16, float32: got 'fp16'",
        ),
        (["export", "none", "x", "--shard-sze", "2GB"], "did you mean --shard-size?"),
        (["queries", "none", "many", "x"], "NUMBER takes a whole number: got 'many'"),
        (["imprt", "none", "x"], "did you mean 'convert.py import'?"),
    ],
)
def test_a_wrong_command_is_one_line(tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_and_nothing_at_all(capsys):
    assert main(["--help"]) == 0
    assert "example:" in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.parametrize("text", ["2", "GB", "0GB", "-1GB", "1.5GB", "2TB"])
def test_a_size_is_checked(text):
    with pytest.raises(ConfigError, match="whole number"):
        num_bytes(text)
    assert num_bytes("500MB") == 500_000_000


def test_a_link_is_followed_to_where_the_folder_is_to_be(tmp_path):
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    for name in ("empty", "nowhere"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        with new_folder(tmp_path / name) as folder:
            assert folder.parent == tmp_path / "disk", "built on the disk that is to hold it"
            (folder / "x").write_text(name)
        assert (tmp_path / "disk" / name / "x").read_text() == name
        assert (tmp_path / name).is_symlink()
        with pytest.raises(WeightsError, match="is there already"), new_folder(tmp_path / name):
            pass
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(WeightsError, match="is there already"), new_folder(tmp_path / "round"):
        pass


def test_a_mounted_disk_is_refused_before_any_work(tmp_path, monkeypatch, capsys):
    released = write_folder(tmp_path / "released", golden_tensors())
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == disk)
    assert main(["import", str(released), str(disk)]) == 2
    said = capsys.readouterr().err
    assert "is the top of a mounted disk, expected a new folder: name a folder inside it" in said
    assert "import:" not in said
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device [source...]"),
        OSError(122, "Disk quota exceeded"),
    ],
    ids=["tensorstore", "system"],
)
def test_a_disk_that_fills_up_is_one_line(tmp_path, monkeypatch, capsys, error):
    def full(*_):
        raise error

    released = write_folder(tmp_path / "released", golden_tensors())
    monkeypatch.setattr("qwenvl_jax.checkpoint.weights.write_leaf", full)
    assert main(["import", str(released), str(tmp_path / "ours")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    told = "the disk is full: free some, or write elsewhere"
    assert last == f"convert: {told}: {str(tmp_path)!r}"
    assert [path.name for path in tmp_path.iterdir()] == ["released"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind(tmp_path, number):
    released = write_folder(tmp_path / "released", golden_tensors())
    program = (
        "import os, sys, signal\n"
        "from qwenvl_jax.cli import convert\n"
        "import qwenvl_jax.conversion.run as run\n"
        # A shell without job control starts what is in the background with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        # And nohup starts what it runs with the end of the terminal ignored.
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "write = run.write_weights\n"
        "def stop(*args):\n"
        "    write(*args)\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "run.write_weights = stop\n"
        "sys.exit(convert.main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", program, "import", str(released), str(tmp_path / "ours")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=CONVERT.parent)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["released"]
    if number == signal.SIGHUP:
        command[2] = program.replace("SIGHUP, signal.SIG_DFL", "SIGHUP, signal.SIG_IGN")
        done = subprocess.run(command, check=False, cwd=CONVERT.parent)
        assert done.returncode == 0, "under nohup it goes on"
