"""What a run that goes on may change, and what it is told about the rest."""

import dataclasses

import jax
import pytest
import tiny

from qwenvl_jax.config import ConfigError, LoraConfig, to_dict
from qwenvl_jax.presets import lora_only
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.changes import flat_fields
from qwenvl_jax.training.run_dir import OF_A_NEW_RUN, SIZES, open_run
from qwenvl_jax.training.state import make_layout, to_items

OTHER_VALUES = {
    "model.vision.width": 32,
    "model.vision.num_layers": 4,
    "model.vision.num_heads": 4,
    "model.vision.mlp_dim": 28,
    "model.vision.patch_size": 7,
    "model.vision.table_side": 4,
    "model.vision.norm_eps": 1e-5,
    "model.vision.attention": "window",
    "model.adapter.num_queries": 9,
    "model.adapter.num_heads": 2,
    "model.adapter.norm_eps": 1e-5,
    "model.decoder.width": 64,
    "model.decoder.num_layers": 3,
    "model.decoder.num_heads": 8,
    "model.decoder.head_dim": 16,
    "model.decoder.mlp_dim": 44,
    "model.decoder.vocab_size": 60,
    "model.decoder.seq_length": 48,
    "model.decoder.max_positions": 96,
    "model.decoder.rope_base": 1e5,
    "model.decoder.norm_eps": 1e-5,
    "model.decoder.use_dynamic_ntk": False,
    "model.decoder.use_logn": False,
    "model.image_size": 56,
    "model.image_start_id": 40,
    "model.dtype": "bfloat16",
    "model.attention_backend": "auto",
    "model.remat": "full",
    "model.vit_remat": "full",
    "model.lora.rank": 3,
    "model.lora.alpha": 8.0,
    "model.lora.targets": ("decoder.*",),
    "model.lora.dropout": 0.5,
    "frozen_dtype": "bfloat16",
    "steps": 9,
    "seed": 9,
    "loss_chunk": 20,
}


def changed(config, path, value):
    name, _, rest = path.partition(".")
    if rest:
        value = changed(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


def lora_config(run_dir):
    config = tiny.train_config(run_dir, parameters=lora_only())
    config = changed(config, "data.max_images", 1)
    return changed(config, "model.lora", LoraConfig(rank=2, targets=("decoder.blocks.attn.*",)))


def arrays_of(config):
    items = to_items(make_layout(config, make_mesh(config.mesh, jax.devices()[:1])).abstract)
    return {(i, name): (x.shape, x.dtype) for i, item in items.items() for name, x in item.items()}


def test_settings_that_decide_the_arrays_of_a_checkpoint_are_known():
    config = lora_config("unused")
    whole = flat_fields(to_dict(config.model))
    idle = ("window_side", "global_every", "param_dtype", "attention_block")
    fields = {f"model.{name}".removesuffix(".0") for name in whole if not name.endswith(idle)}
    assert fields == {name for name in OTHER_VALUES if name.startswith("model.")}
    before = arrays_of(config)
    found = {
        path
        for path, value in OTHER_VALUES.items()
        if arrays_of(changed(config, path, value)) != before
    }
    assert found == {*SIZES, *OF_A_NEW_RUN}


def test_what_a_checkpoint_cannot_follow_is_not_offered(tmp_path):
    tmp_path = tmp_path / "a run"  # its path can be pasted
    config = lora_config(tmp_path)
    begun = open_run(config, [])
    begun.begin()
    begun.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    old = f"{tmp_path} holds a run with other settings: "
    back = "give these back their old values, choose another run_dir"
    anew = (
        f"begin anew from what this run has learned, with another --run-dir and --init='{tmp_path}'"
    )
    for changes, told in {
        ("model.lora.rank",): f"{back.replace(', c', ' or c')}; for another model.lora.rank {anew}",
        ("model.lora.rank", "seed"): (
            f"{back}, or say that you mean it with --allow-change seed; "
            f"for another model.lora.rank {anew}"
        ),
        ("model.adapter.num_queries", "model.lora.rank"): (
            f"{back.replace(', c', ' or c')}; no run can begin from weights of another "
            "model.adapter.num_queries"
        ),
    }.items():
        other = config
        for path in changes:
            other = changed(other, path, OTHER_VALUES[path])
        with pytest.raises(ConfigError) as refusal:
            open_run(other, [])
        assert str(refusal.value).startswith(old)
        assert str(refusal.value).endswith(f"; {told}")
