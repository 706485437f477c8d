"""How long a step will take, said before the first one: from earlier runs, or from the work."""

import itertools
import json
from pathlib import Path
from typing import Any

from qwenvl_jax.config import TrainConfig, to_dict
from qwenvl_jax.training.flops import all_peaks, full_step_flops
from qwenvl_jax.training.run_files import METRICS
from qwenvl_jax.training.state import Layout

# Settings that decide how long a step takes, beside the devices.
_DECIDES = ("model", "parameters", "micro_batches", "loss_chunk", "mesh")
_DECIDES_OF_DATA = ("source", "length", "max_images", "image_size", "rows", "attend_across")
_TAIL_BYTES = 2**16  # of a metrics file, which may hold millions of steps


def expected_step_time(config: TrainConfig, layout: Layout, start: dict[str, Any]) -> str:
    """Returns a line: as measured by the newest run of the same settings on the same devices.

    `start` is the manifest's entry of this start. Looked at are the run's own directory and those
    beside it. Without such a run: how long a full batch takes at the peak of the devices, which no
    step reaches; and where that is not known either, that it is not known.
    """
    own = Path(config.run_dir)
    others = sorted(own.parent.glob("*/manifest.json"), key=_age)
    for manifest in (own / "manifest.json", *others):
        seconds = measured(manifest, config, start)
        if seconds is not None:
            return f"expected: {seconds:.3g} s a step, as measured in {manifest.parent}"
    peak = all_peaks()
    if peak is None:
        return "expected: not known, no run of these settings on these devices is beside this one"
    operations = full_step_flops(config, layout.model_state, layout.plan)
    return (
        f"expected: more than {operations / peak:.3g} s a step: a full batch is "
        f"{operations / 1e12:,.4g} TFLOP, at the devices' peak"
    )


def measured(manifest: Path, config: TrainConfig, start: dict[str, Any]) -> float | None:
    """Returns the seconds of a step that the last start of a run came to, if it is alike."""
    try:
        starts = json.loads(manifest.read_text(encoding="utf-8"))["starts"]
        before = [entry for entry in starts if entry["time"] < start["time"]]
        if not before or _pace(before[-1]) != _pace(start | {"config": _plain(config)}):
            return None
        return _last_pace(manifest.parent / METRICS)
    except (OSError, ValueError, KeyError, TypeError):  # another version's, or half written
        return None


def _pace(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns what an entry's steps take their time from."""
    config = entry["config"]
    facts = {name: config[name] for name in _DECIDES}
    facts |= {name: config["data"][name] for name in _DECIDES_OF_DATA}
    return facts | {name: entry[name] for name in ("devices", "processes")}


def _plain(config: TrainConfig) -> dict[str, Any]:
    """Returns the config as the manifest holds it: JSON has no tuples."""
    return json.loads(json.dumps(to_dict(config)))


def _last_pace(metrics: Path) -> float | None:
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines()
    # The first line may be cut by the seek, the last by a kill.
    whole = (json.loads(x) for x in reversed(lines) if x.startswith(b"{") and x.endswith(b"}"))
    paces = (record["seconds_per_step"] for record in whole if "seconds_per_step" in record)
    last = list(itertools.islice(paces, 2))
    # The line of a start's first step holds the compilation.
    return min(last) if len(last) == 2 else None


def _age(path: Path) -> float:
    return -path.stat().st_mtime
