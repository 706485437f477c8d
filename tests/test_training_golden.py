"""The published PyTorch training runs, step by step, through the step that `train.py` runs."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from qwenvl_jax.config import NO_IMAGE, ModelConfig, OptimizerConfig, ParameterRule, TrainConfig
from qwenvl_jax.conversion.config import model_config_from_released
from qwenvl_jax.conversion.rules import qwen_vl_rules
from qwenvl_jax.data.example import Batch
from qwenvl_jax.presets import stage_1, stage_2, stage_3
from qwenvl_jax.sharding import batch_sharding, make_mesh
from qwenvl_jax.training.state import make_layout, start_state
from qwenvl_jax.training.step import make_train_step

pytestmark = pytest.mark.full_compiles

GOLDEN = Path(__file__).parent / "golden"
PICTURES = {"two_images": [1, 0], "one_image": [0]}
LENGTH = 59  # longer than both sequences: padding must change nothing


def golden_config() -> ModelConfig:
    return model_config_from_released(json.loads((GOLDEN / "tiny.config.json").read_text()))


def golden_batch(name: str, config: ModelConfig) -> Batch:
    outputs = load_file(GOLDEN / "tiny.outputs.safetensors")
    ids = outputs[f"{name}.ids"]
    tags = (config.image_start_id, config.image_end_id, config.image_pad_id)
    is_target = ~np.isin(ids, tags) & (np.arange(len(ids)) >= 3)

    def row(values: np.ndarray, dtype: type) -> np.ndarray:
        padded = np.zeros((1, LENGTH), dtype)
        padded[0, : len(values)] = values
        return padded

    starts = np.flatnonzero(ids == config.image_start_id) + 1
    image_start = np.full((1, 2), NO_IMAGE, np.int32)
    image_start[0, : len(starts)] = starts
    pictures = outputs["image224.uint8"]
    images = np.full((1, 2, *pictures.shape[1:]), 77, np.uint8)
    images[0, : len(starts)] = pictures[PICTURES[name]]
    return Batch(
        tokens=row(ids, np.int32),
        targets=row(ids[1:], np.int32),
        loss_weight=row(is_target[1:], np.float32),
        segment=row(np.ones(len(ids)), np.int32),
        position=row(np.arange(len(ids)), np.int32),
        images=images,
        image_start=image_start,
    )


def run_config(stage: str, facts: dict) -> TrainConfig:
    base = tiny.train_config()
    return tiny.train_config(
        steps=facts["steps"],
        model=golden_config(),
        data=dataclasses.replace(base.data, rows=1, length=LENGTH, image_size=224),
        optimizer=OptimizerConfig(
            peak_lr=facts["peak_lr"],
            end_lr=facts["end_lr"],
            warmup_steps=facts["warmup_steps"],
            beta1=facts["betas"][0],
            beta2=facts["betas"][1],
            eps=facts["eps"],
            clip_norm=facts["clip_norm"],
        ),
        parameters=table_of(stage, facts),
    )


def table_of(stage: str, facts: dict) -> tuple[ParameterRule, ...]:
    decays = {"weight_decay": facts["weight_decay"]}
    if stage == "stage3":
        return stage_3(**decays)
    table = {"stage1": stage_1, "stage2": stage_2}[stage]
    return table(tower_decay=facts["vit_layer_decay"], **decays)


def our_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    released = load_file(GOLDEN / "tiny.weights.safetensors")
    ours = {}
    for rule in qwen_vl_rules(config):
        layers = [rule.transform.to_ours(np.float32(released[name])) for name in rule.names()]
        for path, *parts in zip(rule.ours, *layers, strict=True):
            ours[path] = parts[0] if rule.num_layers is None else np.stack(parts)
    return ours


def released_norms(config: ModelConfig, weights: dict[str, np.ndarray]) -> dict[str, float]:
    norms = {}
    for rule in qwen_vl_rules(config):
        for layer, name in enumerate(rule.names()):
            parts = [weights[path] for path in rule.ours]
            parts = parts if rule.num_layers is None else [part[layer] for part in parts]
            norms[name] = sum(np.square(p, dtype=np.float64).sum() for p in parts) ** 0.5
    return norms


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_published_run(stage):
    facts = json.loads((GOLDEN / "tiny.training.json").read_text())[stage]
    config = run_config(stage, facts)
    mesh = make_mesh()
    layout = make_layout(config, mesh)
    shardings = layout.shardings.trainable | layout.shardings.frozen
    weights = {
        path: jax.device_put(array, shardings[path])
        for path, array in our_weights(config.model).items()
    }
    state = start_state(config, layout, weights)
    step = make_train_step(config, layout)
    batches = [
        jax.device_put(golden_batch(name, config.model), batch_sharding(mesh))
        for name in ("two_images", "one_image")
    ]
    found = {"lr": [], "loss": [], "grad_norm": []}
    for i in range(facts["steps"]):
        state, metrics = step(state, batches[i % 2])
        for name, values in found.items():
            values.append(float(metrics[name]))

    np.testing.assert_allclose(found["lr"], facts["lr"], rtol=1e-5)
    np.testing.assert_allclose(found["loss"], facts["loss"], rtol=2e-3)
    np.testing.assert_allclose(found["grad_norm"], facts["grad_norm"], rtol=2e-3)
    assert int(state.guard.skipped) == 0
    final = released_norms(config.model, jax.device_get(state.trainable | state.frozen))
    assert final.keys() == facts["final_param_norm"].keys()
    for name, norm in facts["final_param_norm"].items():
        assert final[name] == pytest.approx(norm, rel=1e-4), name
