"""The files of released folders: what is read, and what is refused, in either format."""

import json
import os
import struct
import zipfile

import numpy as np
import pytest
from released_files import (
    BFLOAT16,
    bits,
    plain,
    read_all,
    save_archive,
    save_safetensors,
    save_torch_zip,
    torch_tensor,
)
from safetensors.numpy import load_file, save_file

from qwenvl_jax.conversion.reader import ReleasedFolder
from qwenvl_jax.conversion.slots import ConversionError, is_finite


def some_tensors() -> dict[str, np.ndarray]:
    grid = np.arange(35, dtype=np.float32).reshape(5, 7)
    return {
        "bf16": (np.arange(6) * 1.5).astype(BFLOAT16).reshape(2, 3),
        "half": np.linspace(-2, 2, 11, dtype=np.float16),
        "ids": np.arange(13),
        "grid": grid,
        "turned": grid.T,
        "column": grid[1:, 3],
    }


def problems_of(path) -> str:
    with ReleasedFolder(path) as folder:
        return "; ".join(folder.problems)


# --- PyTorch's zip format -------------------------------------------------------------------------


def test_a_torch_file_is_read_with_its_strides_and_offsets(tmp_path):
    tensors = some_tensors()
    save_torch_zip(tmp_path / "pytorch_model.bin", tensors)
    assert bits(read_all(tmp_path)) == bits(tensors)


def test_a_wrapped_state_dict_is_read(tmp_path):
    owner = np.arange(6, dtype=np.float32)
    tensor = torch_tensor(owner, "0", 1, (2, 2), (2, 1))
    state = b"}" + plain("state_dict") + b"}" + plain("a.b") + tensor + b"ss"
    save_archive(tmp_path / "x.bin", state, [owner])
    assert read_all(tmp_path)["a.b"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (b"cposix\nsystem\n", "posix.system"),
        (b"cbuiltins\neval\n", "builtins.eval"),
        (b"ctorch\nload\n", "torch.load"),
        (b"ctorch.storage\n_load_from_bytes\n", "torch.storage._load_from_bytes"),
        (b"ccollections\nCounter\n", "collections.Counter"),
        (b"c__main__\nX\n", "__main__.X"),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_that_asks_for_anything_else_is_refused_before_it_runs(
    tmp_path, monkeypatch, call, named, name
):
    ran = []
    monkeypatch.setattr(os, "system", ran.append)
    payload = b"(" + plain("touch " + str(tmp_path / "harm")) + b"t"
    save_archive(tmp_path / name, call + payload + b"R", [])
    found = problems_of(tmp_path)
    assert (named if name.endswith("bin") else "not a safetensors file") in found
    assert ran == []
    assert not (tmp_path / "harm").exists()


OWNER = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    ("start", "shape", "strides", "said"),
    [
        (0, (7,), (1,), "reaches element 6 of a storage that holds 6"),
        (5, (2,), (1,), "reaches element 6"),
        (0, (2, 2), (2**62, 1), "reaches element"),
        (0, (2,), (-1,), "malformed"),
        (-1, (2,), (1,), "malformed"),
        (0, (2, 2), (1,), "malformed"),
        (0, (2.0,), (1,), "malformed"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(tmp_path, start, shape, strides, said):
    tensor = torch_tensor(OWNER, "0", start, shape, strides)
    save_archive(tmp_path / "x.bin", b"}" + plain("a") + tensor + b"s", [OWNER])
    assert said in problems_of(tmp_path)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (plain([1]), "holds a list"),
        (b"}" + plain("epoch") + plain(3) + b"s", "not tensors: epoch"),
        (b"ctorch\nFloatStorage\n)R", "cannot be read"),
        (b"(" + plain("module") + b"tQ", "unknown kind of storage"),
        (b"garbage", "cannot be read"),
        (b"r\xff\xff\xff\xff", "cannot be read"),  # a memo index of four billion, nothing to store
        (torch_tensor(OWNER, "../../x", 0, (1,), (1,)), "no entry"),
    ],
)
def test_odd_pickles_end_as_a_named_file(tmp_path, value, said):
    save_archive(tmp_path / "x.bin", value, [OWNER])
    found = problems_of(tmp_path)
    assert found.startswith("x.bin: ")
    assert said in found


def test_other_containers_are_refused_with_a_way_out(tmp_path):
    whole = tmp_path / "whole.bin"
    save_torch_zip(whole, {"a": OWNER})
    cut = tmp_path / "cut.bin"
    cut.write_bytes(whole.read_bytes()[:-40])
    (tmp_path / "legacy.bin").write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    (tmp_path / "page.bin").write_bytes(b"<html>not found</html>")
    (tmp_path / "empty.bin").write_bytes(b"")
    save_torch_zip(tmp_path / "packed.bin", {"a": OWNER}, compression=zipfile.ZIP_DEFLATED)
    save_torch_zip(tmp_path / "big.bin", {"a": OWNER}, byteorder=b"big")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("readme", "hello")
    expected = {
        "cut": "truncated",
        "legacy": "legacy format (before 1.6); with PyTorch at hand",
        "page": "not a PyTorch file",
        "empty": "not a PyTorch file",
        "packed": "compressed",
        "big": "byte order is b'big'",
        "other": "0 files named data.pkl",
    }
    for name, said in expected.items():
        assert said in problems_of(tmp_path / f"{name}.bin")


# --- safetensors ----------------------------------------------------------------------------------


def test_safetensors_agree_with_the_library_both_ways(tmp_path):
    tensors = {name: np.ascontiguousarray(x) for name, x in some_tensors().items()}
    numpy_only = {name: x for name, x in tensors.items() if x.dtype != BFLOAT16}
    save_file(numpy_only, tmp_path / "theirs.safetensors")
    assert bits(read_all(tmp_path / "theirs.safetensors")) == bits(numpy_only)
    save_safetensors(tmp_path / "ours.safetensors", numpy_only)
    assert bits(load_file(tmp_path / "ours.safetensors")) == bits(numpy_only)
    save_safetensors(tmp_path / "bf16.safetensors", some_tensors())
    assert bits(read_all(tmp_path / "bf16.safetensors")) == bits(tensors)


def raw_safetensors(header, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"abc", "truncated, it has only 3 bytes"),
        (raw_safetensors({}, b"", 2**63), "header would have 9223372036854775808 bytes"),
        (raw_safetensors({}, b"", 5000), "truncated in its header"),
        (raw_safetensors(b"not json", b""), "not JSON"),
        (raw_safetensors([], b""), "not a JSON object"),
        (raw_safetensors(b'{"a":1,"a":2}', b""), "names appear twice: a"),
        (raw_safetensors({"a": 1}, b""), "entry of a is malformed"),
        (raw_safetensors({"a": entry(0, 8, (-2,))}, bytes(8)), "entry of a is malformed"),
        (raw_safetensors({"a": entry(0, 8, dtype="F8")}, bytes(8)), "a has dtype F8"),
        (raw_safetensors({"a": entry(0, 4)}, bytes(4)), "a of shape [2] and dtype F32 needs 8"),
        (raw_safetensors({"a": entry(0, 8)}, bytes(5)), "lost 1 of 1 tensor; copy"),
        (raw_safetensors({"a": entry(0, 8)}, bytes(9)), "1 bytes after its last tensor"),
        (raw_safetensors({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b overlaps a"),
        (raw_safetensors({"a": entry(0, 8), "b": entry(9, 17)}, bytes(17)), "b leaves a gap"),
        (raw_safetensors({"a": entry(-8, 0)}, bytes(8)), "its offsets are -8 to 0"),
    ],
)
def test_a_damaged_safetensors_file_is_refused_by_name(tmp_path, contents, said):
    (tmp_path / "model.safetensors").write_bytes(contents)
    found = problems_of(tmp_path)
    assert found.startswith("model.safetensors: ")
    assert said in found


# --- folders --------------------------------------------------------------------------------------


def write_index(folder, weight_map, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_make_one_set_of_names(tmp_path):
    tensors = some_tensors()
    names = list(tensors)
    for number, part in enumerate((names[:2], names[2:]), 1):
        file = tmp_path / f"pytorch_model-0000{number}-of-00002.bin"
        save_torch_zip(file, {name: tensors[name] for name in part})
    assert bits(read_all(tmp_path)) == bits(tensors)


def test_safetensors_go_before_pickles_and_openclip_before_both(tmp_path):
    one = {"a": np.ones(3, np.float32)}
    save_torch_zip(tmp_path / "pytorch_model.bin", {"pickle": one["a"]})
    save_safetensors(tmp_path / "model.safetensors", {"plain": one["a"]})
    assert set(read_all(tmp_path)) == {"plain"}
    save_torch_zip(tmp_path / "open_clip_pytorch_model.bin", {"visual.a": one["a"]})
    assert set(read_all(tmp_path)) == {"visual.a"}


def test_an_index_names_the_files_and_strays_beside_them_are_not_read(tmp_path):
    one = np.ones(3, np.float32)
    save_safetensors(tmp_path / "model-a.safetensors", {"a": one})
    save_safetensors(tmp_path / "tail.safetensors", {"b": one})
    save_safetensors(tmp_path / "model_old.safetensors", {"a": one, "old": one})
    save_torch_zip(tmp_path / "pytorch_model.bin", {"pickle": one})
    write_index(tmp_path, {"a": "model-a.safetensors", "b": "tail.safetensors"})
    assert set(read_all(tmp_path)) == {"a", "b"}
    save_safetensors(tmp_path / "model.safetensors", {"whole": one})
    assert set(read_all(tmp_path)) == {"whole"}, "one file before an index"


def test_an_adapter_or_other_tensors_beside_pickles_are_not_the_model(tmp_path):
    one = np.ones(3, np.float32)
    save_torch_zip(tmp_path / "pytorch_model-1.bin", {"a": one})
    save_torch_zip(tmp_path / "pytorch_model-2.bin", {"b": one})
    save_safetensors(tmp_path / "adapter_model.safetensors", {"adapter": one})
    save_safetensors(tmp_path / "extra.safetensors", {"extra": one})
    assert set(read_all(tmp_path)) == {"a", "b"}
    write_index(tmp_path, {"b": "pytorch_model-2.bin"}, "pytorch_model.bin.index.json")
    assert set(read_all(tmp_path)) == {"b"}
    save_torch_zip(tmp_path / "pytorch_model.bin", {"whole": one})
    assert set(read_all(tmp_path)) == {"whole"}
    for file in tmp_path.glob("pytorch_model*"):
        file.unlink()
    assert set(read_all(tmp_path)) == {"extra"}
    (tmp_path / "extra.safetensors").unlink()
    with pytest.raises(ConversionError, match="holds no"):
        ReleasedFolder(tmp_path)


def test_every_disagreement_of_shards_and_index_is_collected(tmp_path):
    one = {"a": np.ones(3, np.float32)}
    save_safetensors(tmp_path / "model-1.safetensors", one)
    save_safetensors(tmp_path / "model-2.safetensors", one)
    (tmp_path / "model-3.safetensors").write_bytes(b"cut")
    shards = {"a": "model-1.safetensors", "b": "model-3.safetensors", "c": "model-4.safetensors"}
    write_index(tmp_path, {**shards, "d": "model-2.safetensors"})
    with ReleasedFolder(tmp_path) as folder:
        assert folder.problems == [
            "model-4.safetensors is missing: model.safetensors.index.json names it",
            "a is in two files: model-1.safetensors and model-2.safetensors",
            "model-3.safetensors: is truncated, it has only 3 bytes",
        ]
        # b and c went down with their files, which have been named; d is simply not there
        assert [folder.may_hold(name) for name in "bcd"] == [True, True, False]


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_point_out_of_its_folder(tmp_path, shard):
    save_safetensors(tmp_path / "model-1.safetensors", {"a": np.ones(3, np.float32)})
    write_index(tmp_path, {"a": shard})
    with pytest.raises(ConversionError, match="expected a file name"):
        ReleasedFolder(tmp_path)


def test_folders_without_weights_say_so(tmp_path):
    with pytest.raises(ConversionError, match="no such file or folder"):
        ReleasedFolder(tmp_path / "none")
    with pytest.raises(ConversionError, match="holds no"):
        ReleasedFolder(tmp_path)


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)])
def test_non_finite_values_are_found_among_extremes(dtype):
    largest = np.array([3e38 if dtype != np.float16 else 65504.0, -0.0, 0.0], np.float64)
    fine = np.concatenate([largest, -largest]).astype(dtype)
    assert is_finite(fine)
    assert is_finite(fine[:0])
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(fine, np.array(value, dtype)).reshape(-1, 1).T)
