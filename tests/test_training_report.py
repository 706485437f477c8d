"""What a person sees: operations counted by hand, speeds, words about memory, where time goes."""

import dataclasses
import io
import json
import os
import re
import sys
import time

import jax
import pytest
import tiny
from PIL import Image
from rich.console import Console

from qwenvl_jax.config import ConfigError, EvaluationConfig, MeshConfig, to_dict
from qwenvl_jax.data.mixture import Round
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.presets import qwen_vl, stage_1, stage_2, stage_3
from qwenvl_jax.sharding import make_mesh
from qwenvl_jax.training.expectation import expected_step_time
from qwenvl_jax.training.flops import _tower_pairs, peak_flops, step_flops
from qwenvl_jax.training.goodput import Goodput
from qwenvl_jax.training.introduction import _evaluation, _rounds, introduction
from qwenvl_jax.training.memory import OutOfMemory, explained
from qwenvl_jax.training.optimizer import plan_parameters
from qwenvl_jax.training.plot import draw_curves, draw_tasks, running_mean, tasks_of
from qwenvl_jax.training.report import Report, _numbers, _ProgressBar, tell
from qwenvl_jax.training.run_dir import RunDir
from qwenvl_jax.training.state import make_layout
from qwenvl_jax.training.stop import grace

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
    record = {"images": images, "tokens": tokens, "pairs": pairs}
    assert count(record) == pytest.approx(expected, rel=1e-3)
    # The head answers for what is scored.
    saved = 2 * decoder * (tokens - 40) * 4096 * 151_936
    scored = count(record | {"scored_tokens": 40})
    assert count(record) - scored == pytest.approx(saved, rel=1e-2)


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
    goodput.started()
    split = goodput.split()
    assert split["start"] >= 0.02
    assert split["productive"] < 0.02


def test_the_bar_shows_everything_at_any_width():
    record = {
        "step": 640, "loss": 0.4408, "lr": 3.84e-4, "grad_norm": 1.47, "padding": 0.06,
        "tokens_per_second": 13_027.0, "images_per_second": 585.5, "seconds_per_step": 0.962,
        "mfu": 0.451, "skipped": 2, "bad_samples": 3,
    }  # fmt: skip
    told = [part for part in _numbers(record).split("  ") if part]
    assert told[-3:] == ["MFU 45.1%", "unusable samples 3", "skipped 2"]
    for width in (40, 80, 200):
        screen = io.StringIO()
        console = Console(file=screen, width=width, force_terminal=True, color_system=None)
        bar = _ProgressBar(0, 4200, console)
        bar.show(record)
        bar.stop()
        last = " ".join(screen.getvalue().rpartition("640/4200")[2].split())
        assert "━" in last
        for part in (*told, "-:--:--"):
            assert part in last, (width, part, last)


def test_windows_see_less():
    vision = dataclasses.replace(tiny.model_config().vision, num_layers=5, patch_size=14)
    assert _tower_pairs(vision, 70) == 5 * 25**2
    # A grid of 5 x 5 has windows of 2 and 1 on a side; one block of five sees everything.
    pairs = sum((a * b) ** 2 for a in (2, 2, 1) for b in (2, 2, 1))
    windowed = dataclasses.replace(vision, attention="window", global_every=4, window_side=2)
    assert _tower_pairs(windowed, 70) == 25**2 + 4 * pairs
    assert _tower_pairs(windowed, 28) == 5 * 4**2  # one window, which is everything


# --- by task --------------------------------------------------------------------------------------


def record_of(step, **losses) -> dict:
    by_task = {f"loss/{task}": loss for task, loss in losses.items()}
    return {"step": step, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0} | by_task | {
        f"scored_tokens/{task}": 5.0 for task in losses
    }  # fmt: skip


def test_curves_have_a_line_for_each_task(tmp_path):
    from matplotlib.figure import Figure

    records = [record_of(1, vqa=3.0), record_of(2, vqa=2.0, ocr=1.0), record_of(3)]
    assert tasks_of(records) == ["ocr", "vqa"]
    panel = Figure().subplots()
    draw_tasks(panel, records, tasks_of(records))
    lines = {line.get_label(): line.get_xydata().tolist() for line in panel.get_lines()}
    assert lines == {"ocr": [[2, 1.0]], "vqa": [[1, 3.0], [2, 2.0]]}

    runs = {"several": records, "one": [record_of(1, vqa=3.0), record_of(2, vqa=2.0)]}
    for name, lines in (runs | {"none": [record_of(1), record_of(2)]}).items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    several, one, none = (
        Image.open(draw_curves(tmp_path / name)).size for name in ("several", "one", "none")
    )
    assert several[1] > 1.4 * none[1]  # one panel more
    assert one == none


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"loss": "low"}, "'loss' of step 7, got 'low'; mend it"),
        ({"loss/vqa": [1.0]}, r"'loss/vqa' of step 7, got \[1.0\]; mend it"),
        ({"loss/ocr": 2.0}, "'scored_tokens/ocr' of step 7, got 'nothing'; mend it"),
    ],
)
def test_a_line_that_no_run_has_written_is_named(tmp_path, changed, told):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record_of(7, vqa=1.0) | changed) + "\n")
    with pytest.raises(ConfigError, match=f"metrics.jsonl is damaged: expected a number as {told}"):
        draw_curves(tmp_path)


def test_a_short_run_has_whole_steps_and_no_mean_of_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    text = "".join(json.dumps(record_of(step)) + "\n" for step in range(1, 21))
    (tmp_path / "metrics.jsonl").write_text(text)
    draw_curves(tmp_path)
    panels = drawn[0].axes
    assert [line.get_label() for line in panels[0].get_lines()][1:] == ["loss"]
    assert all(tick == round(tick) for tick in panels[-1].get_xticks())
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record_of(7, vqa=1.0, ocr=2.0)) + "\n")
    draw_curves(tmp_path)  # a line of one point is none
    drawn_lines = [panel.get_lines()[-1] for panel in drawn[1].axes]
    assert [(line.get_marker(), len(line.get_xdata())) for line in drawn_lines] == [("o", 1)] * 4
    assert [tick for tick in drawn[1].axes[-1].get_xticks() if 6 < tick < 8] == [7]


def test_running_means_follow_the_weights():
    assert running_mean([1.0, 2.0, 6.0], 2).tolist() == [1.0, 1.5, 4.0]
    assert running_mean([1.0, 2.0, 6.0], 2, [1.0, 3.0, 1.0]).tolist() == [1.0, 1.75, 3.0]


# --- before the first step, and at the end --------------------------------------------------------


def run_beside(folder, config, seconds, **changes):
    """Writes what an earlier run leaves: one start, and its last steps."""
    folder.mkdir(parents=True)
    entry = {"time": "2026-01-01", "devices": "1 x cpu", "processes": 1} | changes
    entry["config"] = json.loads(json.dumps(to_dict(config)))
    (folder / "manifest.json").write_text(json.dumps({"starts": [entry]}))
    lines = [{"step": 1, "seconds_per_step": 9.0}, {"step": 2, "seconds_per_step": seconds}]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 3, "passed_over": True}])
    (folder / "metrics.jsonl").write_text(text + '{"step": 4, "seco')


def test_the_time_of_a_step_is_told_from_runs_alike(tmp_path, monkeypatch):
    config = tiny.train_config(tmp_path / "new", parameters=stage_2())
    layout = make_layout(config, make_mesh())
    start = {"time": "2026-02-01", "devices": "1 x cpu", "processes": 1}

    def told() -> str:
        return expected_step_time(config, layout, start)

    assert "expected: not known" in told()
    other = dataclasses.replace(config, micro_batches=2)
    run_beside(tmp_path / "a", other, 0.1)
    run_beside(tmp_path / "b", config, 0.2, devices="8 x cpu")
    run_beside(tmp_path / "c", config, 0.25, time="2026-02-01")  # this very start
    assert "expected: not known" in told()
    monkeypatch.setattr("qwenvl_jax.training.expectation.all_peaks", lambda: 1e9)
    bound = float(told().split("more than ")[1].split()[0])
    data = config.data
    full = {"tokens": 8 * 19, "images": 16, "pairs": 8 * 19 * 20 / 2}
    count = step_flops(config.model, layout.model_state, layout.plan, data.image_size)
    assert bound == pytest.approx(count(full) / 1e9, rel=1e-2)
    run_beside(tmp_path / "one", config, None)
    one = tmp_path / "one" / "metrics.jsonl"
    one.write_text('{"step": 1, "seconds_per_step": 9.0}\n')  # which holds the compilation
    assert "more than" in told()
    cheap = dataclasses.replace(config, log_every=7, seed=3)
    run_beside(tmp_path / "d", cheap, 0.3)
    assert told() == f"expected: 0.3 s a step, as measured in {tmp_path / 'd'}"
    run_beside(tmp_path / "new", config, 0.4)
    assert told() == f"expected: 0.4 s a step, as measured in {tmp_path / 'new'}"


def test_a_stop_that_takes_too_long_says_what_follows():
    assert grace(2.04, 30.0) == "a stop takes 2.0 s, within guard.grace_seconds=30"
    assert "a stop takes 31.0 s, LONGER THAN guard.grace_seconds=30" in grace(31.0, 30.0)


def test_large_arrays_that_no_axis_splits_are_told_before_the_first_step(tmp_path):
    config = tiny.train_config(run_dir=str(tmp_path / "run"))
    decoder = dataclasses.replace(config.model.decoder, vocab_size=2**13)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=decoder))
    run_dir = RunDir(config, {"starts": [{"time": ""}]}, [], None)

    def told(tensor, rows=None):
        mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=tensor), jax.devices()[:tensor])
        return introduction(config, make_layout(config, mesh), 0, run_dir, rows)

    lines = told(3)
    assert lines[-1] == f"{tmp_path / 'run'}: starts from random weights, 6 steps"
    at = lines.index("replicated on every chip along that axis:")
    assert lines[at - 1].startswith("mesh {'data': 1, 'fsdp': 1, 'tensor': 3}")
    found = re.compile(
        r"  decoder\.\S+ [\d.]+ MB: replicated: does not divide .*vocab=8192 over ten"
    )
    assert found.match(lines[at + 1])
    assert not any("replicated" in line for tensor in (1, 2) for line in told(tensor))


def test_answers_that_nobody_wants_are_not_told():
    for samples, more in (
        (0, ""),
        (1, ", 1 answer to samples with one picture drawn in a/samples"),
    ):
        asked = EvaluationConfig(every_steps=2, samples=samples, max_new_tokens=8)
        told = _evaluation(tiny.train_config("a", evaluation=asked))
        assert told == [f"every 2 steps: loss of 4 held-out batches of 8 rows{more}"]


def test_how_often_a_run_sees_its_data_is_told():
    config = tiny.train_config(steps=20)
    assert _rounds(config, None) == []
    rows = 20 * config.data.rows
    for num_rows, told in ((rows * 10, "0.1"), (rows, "1"), (rows // 40, "40")):
        (line,) = _rounds(config, Round(num_rows, {"rows": 1.0}))
        assert line == f"the data: {num_rows:,} packed rows; 20 steps see them {told} times"
    (line,) = _rounds(config, Round(rows // 4, {"a": 1.0, "b": 0.02, "c": 25.0}))
    assert line == "the data: 3 sources; 20 steps see them 0.08 times (b) to 100 times (c)"


def test_a_log_that_nobody_reads_ends_no_run(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        tell("the first line, which meets a closed pipe")
        tell("and those after it, which go nowhere")
        monkeypatch.undo()
        assert os.path.samestat(os.fstat(out.fileno()), os.stat(os.devnull))


def test_a_log_on_a_full_disk_ends_no_run(monkeypatch):
    out = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", out)
    tell("a line")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):  # so it was that disk
        out.close()
