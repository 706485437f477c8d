"""Released names to ours and back: total, bit for bit, and everything wrong named at once."""

import dataclasses
import json
import shutil
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from released_files import (
    BFLOAT16,
    GOLDEN,
    bits,
    golden_tensors,
    read_all,
    save_safetensors,
    save_torch_zip,
    write_folder,
)
from safetensors.numpy import load_file

from qwenvl_jax.checkpoint.weights import WeightsError, open_weights
from qwenvl_jax.config import (
    MeshConfig,
    ModelConfig,
)
from qwenvl_jax.conversion import transforms
from qwenvl_jax.conversion.config import (
    mlp_ratio,
    model_config_from_released,
    released_config,
)
from qwenvl_jax.conversion.load import load_weights, read_config
from qwenvl_jax.conversion.rules import qwen_vl_rules
from qwenvl_jax.conversion.run import export_released, import_released
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.presets import qwen_vl
from qwenvl_jax.sharding import make_mesh, named_arrays

NULL = object()  # there, and null


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A released folder, and ours made from it."""
    root = tmp_path_factory.mktemp("golden")
    released = write_folder(root / "released", golden_tensors())
    (released / "qwen.tiktoken").write_text("IQ== 0\n")
    import_released(released, root / "ours")
    return released, root / "ours"


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transform", "shape", "our_shapes"),
    [
        (transforms.keep(), (5, 7), [(5, 7)]),
        (transforms.linear(), (5, 7), [(7, 5)]),
        (transforms.linear_from_heads(3), (7, 15), [(3, 5, 7)]),
        (transforms.fused_blocks(3), (45, 7), [(7, 3, 5)] * 3),
        (transforms.fused_blocks(3), (45,), [(3, 5)] * 3),
        (transforms.fused_per_head(3), (45, 7), [(7, 3, 5)] * 3),
        (transforms.fused_per_head(3), (45,), [(3, 5)] * 3),
        (transforms.patch_convolution(2), (5, 3, 2, 2), [(12, 5)]),
    ],
)
def test_each_transform_is_undone_exactly(transform, shape, our_shapes):
    tensor = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    ours = transform.to_ours(tensor)
    assert [part.shape for part in ours] == our_shapes
    assert sorted(np.concatenate([part.ravel() for part in ours])) == sorted(tensor.ravel())
    copies = tuple(np.ascontiguousarray(part) for part in ours)
    np.testing.assert_array_equal(transform.to_released(copies), tensor)


def test_the_fused_layouts_are_those_of_the_released_modules():
    """x @ W.T split as each released module splits it equals our three einsums."""
    N, H, D = 3, 5, 7
    random = np.random.default_rng(0)
    x, weight = random.normal(size=D), random.normal(size=(3 * N * H, D))
    projected = weight @ x
    blocks = projected.reshape(3, N, H)  # c_attn and torch's MHA: split(3), then heads
    per_head = projected.reshape(N, 3, H).swapaxes(0, 1)  # VisualAttention: heads, then split(3)
    for transform, expected in (
        (transforms.fused_blocks(N), blocks),
        (transforms.fused_per_head(N), per_head),
    ):
        for kernel_DNH, want_NH in zip(transform.to_ours(weight), expected, strict=True):
            np.testing.assert_allclose(np.einsum("d,dnh->nh", x, kernel_DNH), want_NH)


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [qwen_vl(), None], ids=["released size", "golden"])
def test_the_table_covers_every_array_of_the_model_once(config):
    if config is None:
        config = read_config_file()
    rules = qwen_vl_rules(config)
    ours = {}
    for rule in rules:
        for path, shape in zip(rule.ours, rule.our_shapes(), strict=True):
            assert path not in ours
            ours[path] = shape
    state = abstract_state(config)[1]
    assert ours == {path: array.shape for path, array in named_arrays(state).items()}


def read_config_file() -> ModelConfig:
    return model_config_from_released(json.loads((GOLDEN / "tiny.config.json").read_text()))


def test_the_released_size_has_853_tensors_and_its_published_bytes():
    rules = qwen_vl_rules(qwen_vl())
    names = [name for rule in rules for name in rule.names()]
    assert len(names) == len(set(names)) == 853
    elements = sum(len(rule.names()) * int(np.prod(rule.shape)) for rule in rules)
    assert 2 * elements == 19_313_870_336
    assert sum(x.size for x in jax.tree.leaves(abstract_state(qwen_vl())[1])) == elements


def test_the_golden_names_are_the_tables_names():
    rules = qwen_vl_rules(read_config_file())
    expected = {name: rule.shape for rule in rules for name in rule.names()}
    found = {name: x.shape for name, x in load_file(GOLDEN / "tiny.weights.safetensors").items()}
    assert expected == found


# --- there and back -------------------------------------------------------------------------------


def test_import_and_export_give_back_every_bit(golden, tmp_path):
    released, ours = golden
    assert export_released(ours, tmp_path / "one") == 1
    assert bits(read_all(tmp_path / "one")) == bits(golden_tensors())
    assert (tmp_path / "one" / "qwen.tiktoken").read_text() == "IQ== 0\n"
    assert read_config(tmp_path / "one") == read_config(ours) == read_config(released)
    count = export_released(ours, tmp_path / "many", shard_bytes=400_000)
    assert count > 5
    assert bits(read_all(tmp_path / "many")) == bits(golden_tensors())
    sizes = [file.stat().st_size for file in (tmp_path / "many").glob("*.safetensors")]
    assert len(sizes) == count
    assert max(sizes) < 410_000
    # The files are the library's too.
    theirs = load_file(tmp_path / "one" / "model.safetensors")
    assert theirs["transformer.visual.attn_pool.pos_embed"].dtype == np.float32


def test_a_pickled_checkpoint_imports_to_the_same_arrays(golden, tmp_path):
    tensors = golden_tensors()
    names = sorted(tensors)
    folder = tmp_path / "released"
    folder.mkdir()
    shutil.copy(GOLDEN / "tiny.config.json", folder / "config.json")
    for number, part in enumerate((names[:20], names[20:]), 1):
        file = folder / f"pytorch_model-0000{number}-of-00002.bin"
        save_torch_zip(file, {name: tensors[name] for name in part})
    import_released(folder, tmp_path / "ours")
    assert manifest(tmp_path / "ours") == manifest(golden[1])


def manifest(folder) -> dict:
    return json.loads((folder / "weights.json").read_text())["arrays"]


def test_layers_are_stacked_in_order_and_qkv_are_told_apart(golden):
    leaves, tensors = open_weights(golden[1]), golden_tensors()
    whole = (slice(None),) * 4
    k_KDNH = leaves["decoder.blocks.attn.k_proj.kernel"].read(whole)
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    np.testing.assert_array_equal(k_KDNH[1].reshape(256, 256), fused[256:512].T)
    gate_KDF = leaves["decoder.blocks.mlp.gate_proj.kernel"].read(whole[:3])
    np.testing.assert_array_equal(gate_KDF[0], tensors["transformer.h.0.mlp.w2.weight"].T)
    v_KNH = leaves["vit.blocks.attn.v_proj.bias"].read(whole[:3])
    fused = tensors["transformer.visual.transformer.resblocks.1.attn.in_proj.bias"]
    np.testing.assert_array_equal(v_KNH[1, 2], fused[2 * 48 + 32 : 3 * 48])


@pytest.mark.parametrize("source", ["released", "ours"])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 1)])
def test_weights_load_onto_any_mesh_in_the_wanted_dtype(golden, source, sizes):
    folder = golden[source == "ours"]
    config = read_config(folder)
    data, fsdp, tensor = sizes
    mesh = make_mesh(
        MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: np.prod(sizes)]
    )
    _, abstract = abstract_state(config, mesh)
    loaded, wanted = named_arrays(load_weights(folder, abstract)), named_arrays(abstract)
    tensors = golden_tensors()
    assert loaded.keys() == wanted.keys()
    for path, array in loaded.items():
        assert array.dtype == np.float32
        assert array.sharding == wanted[path].sharding, path
    np.testing.assert_array_equal(
        loaded["decoder.lm_head.kernel"], tensors["lm_head.weight"].T.astype(np.float32)
    )
    np.testing.assert_array_equal(
        loaded["decoder.blocks.mlp.down_proj.kernel"],
        np.stack([tensors[f"transformer.h.{k}.mlp.c_proj.weight"].T for k in range(2)]).astype(
            "f4"
        ),
    )


def test_the_position_table_is_loaded_and_not_made_again(golden, tmp_path):
    tensors = golden_tensors()
    name = "transformer.visual.attn_pool.pos_embed"
    tensors[name] = tensors[name] + np.float32(0.25)  # as the original fine-tuning may leave it
    folder = write_folder(tmp_path / "tuned", tensors)
    _, abstract = abstract_state(read_config(folder))
    loaded = named_arrays(load_weights(folder, abstract))
    np.testing.assert_array_equal(loaded["adapter.position_embed"], tensors[name])


def test_export_can_round_to_another_dtype(golden, tmp_path):
    export_released(golden[1], tmp_path / "bf16", dtype="bfloat16")
    found = read_all(tmp_path / "bf16")
    assert {x.dtype for x in found.values()} == {BFLOAT16}
    name = "transformer.visual.attn_pool.pos_embed"
    np.testing.assert_array_equal(found[name], golden_tensors()[name].astype(BFLOAT16))
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_export_takes_code_and_settings_from_a_released_folder(golden, tmp_path):
    released = tmp_path / "released"
    shutil.copytree(golden[0], released)
    for name in ("modeling_qwen.py", "visual.py", "tokenizer_config.json", "LICENSE", "x.bin"):
        (released / name).write_text(f"that of {name}")
    with pytest.raises(ConversionError, match="no `auto_map`: expected a folder with the released"):
        export_released(golden[1], tmp_path / "new", like=released)
    described = json.loads((released / "config.json").read_text())
    auto_map = {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        "AutoTokenizer": ["elsewhere/code--tokenization_qwen.QWenTokenizer", None],
    }
    (released / "config.json").write_text(json.dumps(described | {"auto_map": auto_map}))
    with pytest.raises(ConversionError, match=r"configuration_qwen\.py is missing"):
        export_released(golden[1], tmp_path / "new", like=released)
    assert not (tmp_path / "new").exists()

    (released / "configuration_qwen.py").write_text("raise SystemExit('it was run')")
    export_released(golden[1], tmp_path / "new", like=released)
    added = {"modeling_qwen.py", "visual.py", "configuration_qwen.py", "tokenizer_config.json"}
    for name in added | {"LICENSE"}:
        assert (tmp_path / "new" / name).read_bytes() == (released / name).read_bytes()
    assert not (tmp_path / "new" / "x.bin").exists()
    plain = export_released(golden[1], tmp_path / "plain")
    assert plain == 1
    without = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == without | {
        "auto_map": auto_map
    }
    assert bits(read_all(tmp_path / "new")) == bits(read_all(golden[0]))


# --- everything wrong, at once --------------------------------------------------------------------


def test_one_error_names_everything_that_is_wrong(tmp_path):
    tensors = golden_tensors()
    layer = "transformer.h.{}.mlp.w1.weight"
    del tensors["transformer.ln_f.weight"]
    tensors["transformer.h.2.ln_1.weight"] = np.ones(256, BFLOAT16)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
    tensors[layer.format(1)] = tensors[layer.format(1)].astype(np.float32)
    tensors["transformer.visual.proj"] = np.ones((256, 256), np.int64)
    tensors["transformer.visual.ln_pre.bias"][3] = np.nan
    tensors["transformer.wte.weight"][-1, -1] = -np.inf
    folder = write_folder(tmp_path / "released", tensors)
    (folder / "model.safetensors").rename(folder / "model-all.safetensors")
    save_safetensors(
        folder / "model-extra.safetensors", {"lm_head.weight": tensors["lm_head.weight"]}
    )
    (folder / "model-cut.safetensors").write_bytes(b"\x01")
    with pytest.raises(ConversionError) as caught:
        import_released(folder, tmp_path / "ours")
    expected = [
        "model-cut.safetensors: is truncated, it has only 1 bytes",
        "lm_head.weight is in two files: model-all.safetensors and model-extra.safetensors",
        "transformer.h.2.ln_1.weight is unknown: got shape (256,), expected no such tensor",
        "lm_head.weight is misshapen: got (447, 256) (114432 elements), expected (448, 256); "
        "do config.json and the weights belong together?",
        "transformer.h.1.mlp.w1.weight has dtype float32, but transformer.h.0.mlp.w1.weight has "
        "bfloat16: the layers become one array and need one dtype",
        "transformer.visual.proj has dtype int64, expected one of bfloat16, float16, float32",
        "transformer.visual.ln_pre.bias holds NaN or infinity",
        "transformer.wte.weight holds NaN or infinity",
    ]
    assert sorted(caught.value.problems) == sorted(expected)
    assert all(problem in str(caught.value) for problem in expected)
    (folder / "model-cut.safetensors").unlink()  # nothing may excuse a missing name any more
    with pytest.raises(ConversionError, match=r"transformer\.ln_f\.weight is missing"):
        import_released(folder, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released"]


def test_a_direct_load_refuses_the_same_things(tmp_path):
    tensors = golden_tensors()
    tensors["transformer.visual.ln_pre.bias"][3] = np.nan
    folder = write_folder(tmp_path / "released", tensors)
    _, abstract = abstract_state(read_config(folder))
    with pytest.raises(ConversionError, match=r"ln_pre\.bias holds NaN"):
        load_weights(folder, abstract)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(golden, tmp_path, stop):
    @contextmanager
    def watch(stage, total):
        def on_bytes(done):
            if stage in ("import", "export"):
                raise stop

        yield on_bytes

    with pytest.raises((KeyboardInterrupt, OSError)):
        import_released(golden[0], tmp_path / "ours", watch)
    with pytest.raises((KeyboardInterrupt, OSError)):
        export_released(golden[1], tmp_path / "released", watch=watch)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_ours_is_not_imported_again(golden, tmp_path):
    with pytest.raises(ConversionError, match="of ours already"):
        import_released(golden[1], tmp_path / "ours")


def test_a_folder_that_is_there_is_not_touched(golden, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "note").write_text("mine")
    with pytest.raises(WeightsError, match="is there already"):
        import_released(golden[0], tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["note"]
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


# --- config.json ----------------------------------------------------------------------------------


def test_the_released_config_is_that_of_the_paper_and_comes_back():
    config = qwen_vl()
    released = released_config(config, "bfloat16")
    assert released["visual"]["mlp_ratio"] == 4.9231
    assert released["intermediate_size"] == 22016
    assert model_config_from_released(json.loads(json.dumps(released))) == config


def test_every_mlp_size_has_a_ratio():
    for width in (64, 100, 1664):
        for mlp_dim in range(1, 700):
            assert int(width * mlp_ratio(width, mlp_dim)) == mlp_dim


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"visual": None}, "no `visual`"),
        ({"hidden_size": None}, "hidden_size must be a whole number: got None"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number: got 'many'"),
        ({"visual.width": None}, r"visual\.width must be a whole number"),
        ({"visual.mlp_ratio": "4"}, r"visual\.mlp_ratio must be a number: got '4'"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers must be a whole number: got 2\.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number: got True"),
        ({"kv_channels": "64"}, "kv_channels must be a whole number, or left out: got '64'"),
        ({"kv_channels": NULL}, "kv_channels must be a whole number, or left out: got None"),
        ({"visual.n_queries": NULL}, r"visual\.n_queries must be a whole number, or left out"),
        ({"layer_norm_epsilon": NULL}, "layer_norm_epsilon must be a number, or left out"),
        ({"max_position_embeddings": NULL}, "max_position_embeddings must be a whole number"),
        ({"use_dynamic_ntk": "false"}, "use_dynamic_ntk must be true or false, .* got 'false'"),
        ({"use_logn_attn": 0}, "use_logn_attn must be true or false, or left out: got 0"),
        ({"visual.output_dim": 128}, "output_dim must equal hidden_size: got 128 and 256"),
        ({"rotary_pct": 0.5}, "rotary_pct must be 1.0: got 0.5"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"visual.n_queries": 17}, "must be a square number"),
        ({"kv_channels": 63}, "head_dim must be even"),
    ],
)
def test_a_config_that_cannot_be_ours_is_refused(changes, said):
    released = json.loads((GOLDEN / "tiny.config.json").read_text())
    for name, value in changes.items():
        *parents, last = name.split(".")
        place = released[parents[0]] if parents else released
        if value is None:
            del place[last]
        else:
            place[last] = None if value is NULL else value
    with pytest.raises(ConversionError, match=said):
        model_config_from_released(released)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("vision", {"table_side": 8}, "table_side must be 16: got 8"),
        ("vision", {"attention": "window"}, "attention must be global"),
        ("adapter", {"num_heads": 4}, "num_heads .* must be 2: got 4"),
        ("decoder", {"head_dim": 32}, "must be 256: got 128"),
    ],
)
def test_a_model_without_a_released_form_is_refused_by_setting(part, changes, said):
    config = read_config_file()
    config = dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )
    with pytest.raises(ConversionError, match=said):
        released_config(config, "float32")


def test_read_config_names_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ConversionError, match="no such folder"):
        read_config(tmp_path / "none")
    with pytest.raises(ConversionError, match=r"config\.json is missing"):
        read_config(tmp_path)
