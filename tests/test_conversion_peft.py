"""A PEFT adapter is added to the released tensors that it was trained beside, and to no others."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from released_files import GOLDEN, golden_tensors, read_all, save_safetensors, save_torch_zip

from qwenvl_jax.checkpoint.weights import WeightsError
from qwenvl_jax.cli.convert import main
from qwenvl_jax.config import LoraConfig
from qwenvl_jax.conversion.config import model_config_from_released
from qwenvl_jax.conversion.load import read_config
from qwenvl_jax.conversion.peft_export import export_adapter
from qwenvl_jax.conversion.run import export_released, import_released
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.model.lora import is_lora
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.sharding import named_variables

RANK, ALPHA = 4, 16
MODULES = [
    f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "mlp.w2")
]
SETTINGS = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}


def half(module, letter):
    return f"base_model.model.{module}.lora_{letter}.weight"


def adapter_tensors(tensors):
    """Returns pairs beside MODULES and a head trained whole, as PEFT names them."""
    rng = np.random.default_rng(0)
    made = {}
    for module in MODULES:
        out, wide = tensors[f"{module}.weight"].shape
        made[half(module, "A")] = rng.normal(size=(RANK, wide)).astype(np.float32)
        made[half(module, "B")] = rng.normal(size=(out, RANK)).astype(np.float32) / 100
    head = tensors["lm_head.weight"].astype(np.float32)
    made["base_model.model.lm_head.weight"] = head + 1
    return made


def write_adapter(folder, tensors, *, save=save_safetensors, name="safetensors", **settings):
    folder.mkdir()
    save(folder / f"adapter_model.{name}", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The golden checkpoint as a released folder in float32, so that sums are not rounded."""
    folder = tmp_path_factory.mktemp("base")
    tensors = {name: tensor.astype(np.float32) for name, tensor in golden_tensors().items()}
    save_safetensors(folder / "model.safetensors", tensors)
    shutil.copy(GOLDEN / "tiny.config.json", folder / "config.json")
    return folder


def joined(base, adapter, where):
    """Returns the released tensors of `base` with `adapter`, by way of our folder."""
    import_released(base, where / "ours", lora=adapter)
    export_released(where / "ours", where / "back")
    return read_all(where / "back")


@pytest.mark.parametrize("is_rs", [False, True])
def test_pairs_are_added_and_all_else_keeps_its_bits(base, tmp_path, is_rs):
    before = read_all(base)
    trained = adapter_tensors(before)
    after = joined(base, write_adapter(tmp_path / "a", trained, use_rslora=is_rs), tmp_path)
    scale = ALPHA / (RANK**0.5 if is_rs else RANK)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        module = name.removesuffix(".weight")
        if module in MODULES:
            added = trained[half(module, "B")] @ trained[half(module, "A")]
            np.testing.assert_allclose(after[name], tensor + scale * added, rtol=1e-5, atol=1e-6)
            assert np.abs(added).max() > 0.01
        elif name == "lm_head.weight":
            np.testing.assert_array_equal(after[name], trained[f"base_model.model.{name}"])
        else:
            assert after[name].tobytes() == tensor.tobytes(), name


def test_the_sum_is_rounded_once_to_the_models_dtype(base, tmp_path):
    """The golden file itself is bfloat16: the pair is not rounded before it is added."""
    released = tmp_path / "released"
    released.mkdir()
    shutil.copy(GOLDEN / "tiny.weights.safetensors", released / "model.safetensors")
    shutil.copy(GOLDEN / "tiny.config.json", released / "config.json")
    before = golden_tensors()
    trained = adapter_tensors(before)
    after = joined(released, write_adapter(tmp_path / "a", trained), tmp_path)
    name = f"{MODULES[0]}.weight"
    pair = trained[half(MODULES[0], "B")] @ trained[half(MODULES[0], "A")]
    exact = before[name].astype(np.float32) + ALPHA / RANK * pair
    assert after[name].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(after[name], exact.astype(ml_dtypes.bfloat16))


def test_a_pickled_adapter_gives_the_same(base, tmp_path, capsys):
    trained = adapter_tensors(read_all(base))
    pickled = write_adapter(tmp_path / "b", trained, save=save_torch_zip, name="bin")
    after = joined(base, write_adapter(tmp_path / "a", trained), tmp_path)
    assert main(["import", str(base), str(tmp_path / "cli"), "--lora", str(pickled)]) == 0
    assert "ready" in capsys.readouterr().out
    export_released(tmp_path / "cli", tmp_path / "cli_back")
    for name, tensor in read_all(tmp_path / "cli_back").items():
        assert tensor.tobytes() == after[name].tobytes(), name


def test_everything_that_does_not_fit_is_named_at_once(base, tmp_path):
    trained = adapter_tensors(read_all(base))
    first, second, third, fourth = MODULES
    trained[half("transformer.h.9.mlp.w1", "A")] = np.zeros((RANK, 8), np.float32)
    trained[half("transformer.h.9.mlp.w1", "B")] = np.zeros((8, RANK), np.float32)
    trained[half(first, "A")] = trained[half(first, "A")][:, 1:]
    trained[half(second, "B")] = trained[half(second, "B")][:, 1:]
    trained[half(third, "A")][0, 0] = np.nan
    del trained[half(fourth, "B")]
    doubled = half(third, "B").replace(".weight", ".default.weight")
    trained[doubled] = trained[half(third, "B")]
    trained[f"base_model.model.{fourth}.weight"] = np.zeros((4, 4), np.float32)
    trained["base_model.model.transformer.wte.lora_embedding_A"] = np.zeros((4, 4), np.float32)
    with pytest.raises(ConversionError) as error:
        import_released(base, tmp_path / "out", lora=write_adapter(tmp_path / "a", trained))
    told = str(error.value)
    for part in (
        "transformer.h.9.mlp.w1.weight is trained, but the model has no such tensor",
        f"{first}.weight: got shape",
        f"{second}.weight: A is",
        f"{half(third, 'A')} holds NaN or infinity",
        f"{fourth}.weight: lora_B is missing",
        f"{fourth}.weight is there whole, and as a pair",
        "are for the same matrix",
        "lora_embedding_A is unknown",
    ):
        assert part in told, part
    assert not (tmp_path / "out").exists()


def test_what_was_trained_whole_must_be_there(base, tmp_path, capsys):
    trained = adapter_tensors(read_all(base))
    kept = write_adapter(tmp_path / "kept", trained, modules_to_save=["lm_head"])
    import_released(base, tmp_path / "whole", lora=kept)
    lost = write_adapter(tmp_path / "a", trained, modules_to_save=["wte", "lm_head", "head"])
    assert main(["import", str(base), str(tmp_path / "out"), "--lora", str(lost)]) == 2
    said = capsys.readouterr().err
    assert "2 problems: adapter: wte was trained whole, but its weights are not in" in said
    assert "adapter: head was trained whole" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"alpha_pattern": {"w1": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"modules_to_save": "wte"}, "modules_to_save is 'wte', expected a list of names"),
    ],
)
def test_adapters_of_another_kind_are_refused(base, tmp_path, settings, said):
    trained = adapter_tensors(read_all(base))
    adapter = write_adapter(tmp_path / "a", trained, **settings)
    with pytest.raises(ConversionError, match="cannot be used") as error:
        import_released(base, tmp_path / "out", lora=adapter)
    assert said in str(error.value)


def test_what_is_no_adapter_or_no_model_is_said(base, tmp_path, capsys):
    adapter = write_adapter(tmp_path / "a", adapter_tensors(read_all(base)))
    with pytest.raises(ConversionError, match=r"convert\.py import MODEL DST --lora"):
        read_config(adapter)
    (tmp_path / "empty").mkdir()
    out = str(tmp_path / "out")
    for lora, told in (
        ("none", "the folder itself is missing"),
        ("empty", "adapter_config.json is"),
    ):
        assert main(["import", str(base), out, "--lora", str(tmp_path / lora)]) == 2
        assert told in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").unlink()
    assert main(["import", str(base), out, "--lora", str(adapter)]) == 2
    assert "holds none of adapter_model.safetensors" in capsys.readouterr().err
    words = ["import", "--vit", str(base), "--llm", str(base), out, "--lora", str(adapter)]
    assert main(words) == 2
    assert "--lora is added to a released folder" in capsys.readouterr().err
    import_released(base, tmp_path / "ours")
    with pytest.raises(ConversionError, match="an adapter is added to a released folder"):
        import_released(tmp_path / "ours", tmp_path / "twice", lora=adapter)
    with pytest.raises(WeightsError, match="there already"):
        import_released(base, tmp_path / "ours")


def test_a_pair_that_pytorch_would_not_call_is_not_written(tmp_path, monkeypatch):
    config = model_config_from_released(json.loads((GOLDEN / "tiny.config.json").read_text()))
    lora = LoraConfig(rank=RANK, targets=("adapter.attn.o_proj", "decoder.blocks.mlp.up_proj"))
    config = dataclasses.replace(config, lora=lora)
    shapes = {n: v.get_value().shape for n, v in named_variables(abstract_state(config)[1]).items()}
    trained = {name: np.ones(shape, "f4") for name, shape in shapes.items() if is_lora(name)}
    room = "qwenvl_jax.conversion.peft_export"
    monkeypatch.setattr(f"{room}.run_config", lambda run: config)
    monkeypatch.setattr(f"{room}.read_json", lambda path: {"starts": [{"config": {"init": "x"}}]})
    monkeypatch.setattr(f"{room}.restore_trained", lambda run: trained)
    with pytest.raises(ConversionError) as error:
        export_adapter(tmp_path, tmp_path / "a")
    assert error.value.problems == [
        "adapter: transformer.visual.attn_pool.attn.out_proj is read by "
        "torch.nn.MultiheadAttention, not called: a pair has no effect"
    ]
    trained = {name: array for name, array in trained.items() if name.startswith("decoder")}
    assert export_adapter(tmp_path, tmp_path / "a") == config.decoder.num_layers
