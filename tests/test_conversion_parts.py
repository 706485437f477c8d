"""Stage 1's starting points: an OpenCLIP tower, a Qwen-7B, and a new adapter between them."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from released_files import (
    GOLDEN,
    golden_tensors,
    save_safetensors,
    save_torch_zip,
    write_folder,
)

from qwenvl_jax.conversion.config import model_config_from_parts
from qwenvl_jax.conversion.load import load_weights, read_config
from qwenvl_jax.conversion.run import import_parts
from qwenvl_jax.conversion.slots import ConversionError
from qwenvl_jax.model.adapter import Adapter, sine_table
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.sharding import named_variables

E, LAYERS, HEADS, MLP, PATCH, SIDE = 24, 2, 3, 40, 7, 3
WB = ("weight", "bias")


def openclip_tensors() -> dict[str, np.ndarray]:
    """Returns a CLIP model under OpenCLIP's names: the tower, and a text tower beside it."""
    random = np.random.default_rng(3)
    shapes = {
        "visual.class_embedding": (E,),
        "visual.positional_embedding": (SIDE**2 + 1, E),
        "visual.proj": (E, 10),
        "visual.conv1.weight": (E, 3, PATCH, PATCH),
        **{f"visual.{norm}.{leaf}": (E,) for norm in ("ln_pre", "ln_post") for leaf in WB},
        "positional_embedding": (8, 12),
        "token_embedding.weight": (30, 12),
        "transformer.resblocks.0.attn.in_proj_weight": (36, 12),
        "ln_final.weight": (12,),
        "text_projection": (12, 10),
        "logit_scale": (),
    }
    for k in range(LAYERS):
        block = f"visual.transformer.resblocks.{k}."
        shapes |= {f"{block}{norm}.{leaf}": (E,) for norm in ("ln_1", "ln_2") for leaf in WB}
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * E, E),
            f"{block}attn.in_proj_bias": (3 * E,),
            f"{block}attn.out_proj.weight": (E, E),
            f"{block}attn.out_proj.bias": (E,),
            f"{block}mlp.c_fc.weight": (MLP, E),
            f"{block}mlp.c_fc.bias": (MLP,),
            f"{block}mlp.c_proj.weight": (E, MLP),
            f"{block}mlp.c_proj.bias": (E,),
        }
    return {name: random.normal(size=shape).astype("f4") for name, shape in shapes.items()}


OPENCLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 10,
        "vision_cfg": {
            "image_size": SIDE * PATCH,
            "layers": LAYERS,
            "width": E,
            "head_width": E // HEADS,
            "mlp_ratio": MLP / E,
            "patch_size": PATCH,
        },
    }
}


@pytest.fixture
def sources(tmp_path):
    """An OpenCLIP folder, a Qwen-7B folder, and the tensors of each."""
    vit = tmp_path / "openclip"
    vit.mkdir()
    (vit / "open_clip_config.json").write_text(json.dumps(OPENCLIP_CONFIG))
    tower = openclip_tensors()
    save_torch_zip(vit / "open_clip_pytorch_model.bin", tower)
    # The golden checkpoint's language model alone.
    text = {n: x for n, x in golden_tensors().items() if not n.startswith("transformer.visual")}
    config = json.loads((GOLDEN / "tiny.config.json").read_text())
    del config["visual"]
    return vit, write_folder(tmp_path / "qwen", text, config), tower, text


def combine(sources, target, **options):
    vit, llm, *_ = sources
    return import_parts(vit, llm, target, image_start_id=420, num_queries=9, **options)


def test_tower_and_decoder_become_one_model_with_a_new_adapter(sources, tmp_path):
    *_, tower, text = sources
    config = combine(sources, tmp_path / "start", seed=5)
    assert read_config(tmp_path / "start") == config
    assert (config.vision.num_heads, config.vision.table_side, config.vision.mlp_dim) == (3, 3, MLP)
    _, abstract = abstract_state(config)
    loaded = load_weights(tmp_path / "start", abstract)
    arrays = {path: np.asarray(x.get_value()) for path, x in named_variables(loaded).items()}

    table = tower["visual.positional_embedding"]
    np.testing.assert_array_equal(arrays["vit.position_embed"], table[1:])  # no class row
    fused = [tower[f"visual.transformer.resblocks.{k}.attn.in_proj_weight"] for k in range(LAYERS)]
    k_proj = np.stack([x[E : 2 * E].T.reshape(E, HEADS, E // HEADS) for x in fused])
    np.testing.assert_array_equal(arrays["vit.blocks.attn.k_proj.kernel"], k_proj)
    wte = text["transformer.wte.weight"].astype("f4")
    np.testing.assert_array_equal(arrays["decoder.embed.embedding"], wte)

    np.testing.assert_array_equal(arrays["adapter.position_embed"], sine_table(3, 256))
    fresh = Adapter(config.adapter, E, 256, "float32", rngs=nnx.Rngs(params=jax.random.key(5)))
    for path, variable in named_variables(nnx.state(fresh)).items():
        np.testing.assert_array_equal(arrays[f"adapter.{path}"], variable.get_value())


def test_the_seed_decides_the_new_adapter_and_nothing_else(sources, tmp_path):
    digests = []
    for number, seed in enumerate((5, 5, 6)):
        combine(sources, tmp_path / str(number), seed=seed)
        entries = json.loads((tmp_path / str(number) / "weights.json").read_text())["arrays"]
        digests.append({path: entry["sha256"] for path, entry in entries.items()})
    assert digests[0] == digests[1]
    changed = {path for path in digests[0] if digests[0][path] != digests[2][path]}
    assert "adapter.query" in changed
    assert all(path.startswith("adapter.") for path in changed)


def test_only_listed_names_are_left_out(sources, tmp_path):
    vit, llm, tower, _ = sources
    save_torch_zip(
        vit / "open_clip_pytorch_model.bin",
        tower | {"visual.attn_pool.query": np.ones(3, "f4"), "logit_scale2": np.ones(1, "f4")},
    )
    with pytest.raises(ConversionError) as caught:
        combine(sources, tmp_path / "start")
    assert [problem.split(" is ")[0] for problem in caught.value.problems] == [
        "visual.attn_pool.query",
        "logit_scale2",
    ]
    save_torch_zip(vit / "open_clip_pytorch_model.bin", tower)
    (llm / "model.safetensors").rename(llm / "model-1.safetensors")
    save_safetensors(llm / "model-2.safetensors", {"transformer.visual.proj": np.ones(3, "f4")})
    with pytest.raises(ConversionError, match=r"transformer\.visual\.proj is unknown"):
        combine(sources, tmp_path / "start")
    assert not (tmp_path / "start").exists()


def test_a_whole_model_is_not_taken_for_a_language_model(sources, tmp_path):
    vit, _, *_ = sources
    whole = write_folder(tmp_path / "whole", golden_tensors())
    with pytest.raises(ConversionError, match=r"transformer\.visual\.proj is unknown"):
        import_parts(vit, whole, tmp_path / "start", image_start_id=420, num_queries=9)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": None}, r"vision_cfg\.width must be a whole number: got None"),
        ({"head_width": 7}, "must be a multiple of head_width: got 24 and 7"),
        ({"image_size": 20}, r"multiple of vision\.patch_size"),
        ({"act_kwargs": {"approximate": "tanh"}}, r"act_kwargs must be empty: got \{'approx"),
    ],
)
def test_a_tower_config_that_cannot_be_is_refused(sources, tmp_path, change, said):
    config = json.loads(json.dumps(OPENCLIP_CONFIG))
    config["model_cfg"]["vision_cfg"] |= change
    (sources[0] / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=said):
        combine(sources, tmp_path / "start")
    (sources[0] / "open_clip_config.json").unlink()
    with pytest.raises(ConversionError, match=r"open_clip_config\.json is missing"):
        combine(sources, tmp_path / "start")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (None, r"model_cfg\.vision_cfg must be an object"),
        ({"vision_cfg": None}, r"model_cfg\.vision_cfg must be an object"),
        (OPENCLIP_CONFIG["model_cfg"] | {"quick_gelu": True}, "quick_gelu must be false: got True"),
    ],
)
def test_what_is_no_tower_of_ours_is_refused(model, said):
    text = json.loads((GOLDEN / "tiny.config.json").read_text())
    with pytest.raises(ConversionError, match=said):
        model_config_from_parts({"model_cfg": model}, text, image_start_id=420, num_queries=9)
