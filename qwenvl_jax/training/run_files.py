"""What the files of a run tell of it, and what a start does when one of them is lost or damaged."""

import json
from pathlib import Path
from typing import Any

from qwenvl_jax.checkpoint.frozen import FROZEN
from qwenvl_jax.config import ConfigError, TrainConfig
from qwenvl_jax.data.unchanged import DATA
from qwenvl_jax.files import read_text, replace_text
from qwenvl_jax.training.manifest import MANIFEST, tells_of_saves

METRICS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"
LINES_WAYS_OUT = "mend it, or move it away: the run goes on without its earlier lines"
NO_MANIFEST = "manifest"  # what --allow-change calls a lost one


def has_begun(run_dir: Path, manifest: dict[str, Any]) -> bool:
    """Returns whether there is something to go on with; a failed first start binds no one."""
    lines, folders = (METRICS, EVALUATIONS), ("checkpoints", FROZEN)
    has_lines = any((run_dir / x).exists() and (run_dir / x).stat().st_size > 0 for x in lines)
    has_saved = any((run_dir / x).is_dir() and any((run_dir / x).iterdir()) for x in folders)
    return has_lines or has_saved or tells_of_saves(manifest)


def check_files(run_dir: Path, config: TrainConfig) -> list[str]:
    """Returns what is lost of a run that goes on, and may be; raises ConfigError where it may not.

    Files that are read later are looked at here, before anything is written.
    """
    for name in (METRICS, EVALUATIONS):
        if (run_dir / name).exists():
            read_text(run_dir / name, LINES_WAYS_OUT)
    if (run_dir / MANIFEST).exists():
        return []
    if NO_MANIFEST in config.allow_change:
        return [f"{run_dir} has lost its {MANIFEST}: steps of earlier --skip-steps are not known"]
    raise ConfigError(
        f"{run_dir} holds a run, and its {MANIFEST} is missing: with it are lost the steps to pass "
        "over (--skip-steps, and what led to a spike) and the digest of the vocabulary; restore "
        f"it, choose another run_dir, or go on without it with --allow-change {NO_MANIFEST}, "
        "naming with --skip-steps A:B the steps that are yet to be passed over"
    )


def give_back_data(run_dir: Path, manifest: dict[str, Any]) -> list[str]:
    """Writes a lost data.json again, as the last start that had one noted it; returns a note."""
    noted = [start["data"] for start in manifest["starts"] if "data" in start]
    if not noted or (run_dir / DATA).exists():
        return []
    replace_text(run_dir / DATA, json.dumps(noted[-1]) + "\n")
    return [f"{run_dir / DATA} was lost: written again from {MANIFEST}"]
