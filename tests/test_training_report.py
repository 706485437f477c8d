"""What a person sees: operations counted by hand, speeds, words about memory, where time goes."""

import json
import time

import jax
import pytest
import tiny

from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.presets import qwen_vl, stage_1, stage_2, stage_3
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.flops import peak_flops, step_flops
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.memory import OutOfMemory, explained
from qwenvl_jax.training.optimizer import plan_parameters
from qwenvl_jax.training.report import Report
from qwenvl_jax.training.state import make_layout

# Multiplications of one token, one pair of tokens and one picture of 224 pixels in Qwen-VL.
TOKEN = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 151_936
PAIR = 32 * 2 * 4096
PATCHES = 256
TOWER = PATCHES * 48 * (4 * 1664**2 + 2 * 1664 * 8192 + 2 * PATCHES * 1664)
EMBED = PATCHES * 588 * 1664
ADAPTER = PATCHES * (1664 * 4096 + 2 * 4096**2) + 256 * 2 * 4096**2 + 2 * 256 * PATCHES * 4096


@pytest.mark.parametrize(
    ("table", "times"),
    [
        # embed, tower, adapter, decoder: products for every one of the forward pass
        (stage_1(), (2, 3, 3, 2)),  # through the frozen decoder, but not into its weights
        (stage_2(), (2, 3, 3, 3)),
        (stage_3(), (1, 1, 3, 3)),  # the frozen tower has no backward pass
    ],
)
def test_operations_of_a_step_follow_what_is_trained(table, times):
    config = qwen_vl()
    _, state = abstract_state(config)
    count = step_flops(config, state, plan_parameters(state, table), image_size=224)
    embed, tower, adapter, decoder = times
    images, tokens, pairs = 3, 500, 70_000
    per_image = embed * EMBED + tower * TOWER + adapter * ADAPTER
    # Attention has no weights: both gradients are of its inputs.
    expected = 2 * (images * per_image + decoder * tokens * TOKEN + 3 * pairs * PAIR)
    if table == stage_3():
        # The adapter's first matrix needs no gradient of its input.
        expected -= 2 * images * PATCHES * 1664 * 4096
    assert count({"images": images, "tokens": tokens, "pairs": pairs}) == pytest.approx(
        expected, rel=1e-3
    )


def test_peaks_are_found_by_the_longest_name():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA L40S") is None
    assert peak_flops("cpu") is None


def test_a_record_holds_speeds_and_shares(tmp_path, monkeypatch):
    monkeypatch.setattr("qwenvl_jax.training.report.all_peaks", lambda: 1e12)
    config = tiny.train_config(tmp_path)
    report = Report(config, make_layout(config, make_mesh()), 0)
    numbers = {
        "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0, "tokens": 114, "pairs": 600.0, "images": 4,
        "verdict": 1, "skipped": 1,
    }  # fmt: skip
    for step in (1, 2, 3):
        time.sleep(0.01)
        report.step({"step": step} | numbers)
    report.passed_over(4)
    report.rewind(3)
    report.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    last = lines[-1]
    assert last["tokens_per_second"] == pytest.approx(114 / last["seconds_per_step"], rel=0.02)
    assert last["images_per_second"] == pytest.approx(4 / last["seconds_per_step"], rel=0.02)
    assert last["padding"] == 0.25  # 114 of 8 x 19 places
    assert last["mfu"] == pytest.approx(last["tflops_per_second"], abs=2e-4)
    assert last["verdict"] == "not finite"
    assert list((tmp_path / "tensorboard").iterdir())


def test_lack_of_memory_names_what_fills_it_and_what_helps():
    layout = make_layout(tiny.train_config(), make_mesh())
    reason = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."
    with (
        pytest.raises(OutOfMemory, match=r"allocate 17179869184.*vit\.patch_embed\.kernel.*remat"),
        explained(layout),
    ):
        raise jax.errors.JaxRuntimeError(reason)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), explained(layout):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


def test_time_is_split_by_what_it_went_to():
    goodput = Goodput()
    for _ in range(2):
        with goodput.spend("data"):
            time.sleep(0.02)
    time.sleep(0.02)
    split = goodput.split()
    assert split["data"] >= 0.04
    assert split["total"] == pytest.approx(split["data"] + split["productive"])
    assert "productive" in goodput.summary()
    assert "data" in goodput.summary()
