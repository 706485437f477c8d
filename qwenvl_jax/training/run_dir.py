"""The files of a run beside its checkpoints: config.json, manifest.json and metrics.jsonl.

`python train.py CONFIG` on the same directory goes on with the run, so the directory must be of
the same run: what decides the numbers may not differ.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.config import ConfigError, TrainConfig, save_json, to_dict

# Settings that a resumed run may change: they decide speed, memory and files, not the recipe.
# (Sums of another shape round differently, so only an unchanged run is bit-equal.)
FREE_TO_CHANGE = (
    "run_dir",
    "init",
    "micro_batches",
    "loss_chunk",
    "log_every",
    "mesh",
    "checkpoint",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.path",  # the place; its content is compared by fingerprint
    "data.tokenizer",  # the path; its content is compared by digest in the manifest
    "model.attention_backend",
    "model.attention_block",
    "model.remat",
    "model.vit_remat",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def open_run(config: TrainConfig, command: Sequence[str]) -> list[str]:
    """Creates or continues the run directory; returns notes for the person who started it.

    Raises:
        ConfigError: the directory holds a run with other settings, which are all named.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    record, notes = _describe_start(config, command), []
    manifest_path, config_path = run_dir / "manifest.json", run_dir / "config.json"
    starts = []
    if config_path.exists() and _has_begun(run_dir):
        changed = differences(_read(config_path), to_dict(config))
        wrong = [text for path, text in changed.items() if not _may_change(path)]
        if wrong:
            raise ConfigError(
                f"{run_dir} holds a run with other settings: {'; '.join(wrong)}; "
                "give these back their old values, or choose another run_dir"
            )
        notes += [f"changed since the last start: {text}" for text in changed.values()]
    if manifest_path.exists() and _has_begun(run_dir):
        starts = _read(manifest_path)["starts"]
        _check_data(starts[-1], record, run_dir)
        for name, version in starts[-1]["versions"].items():
            if record["versions"].get(name) != version:
                now = record["versions"].get(name)
                notes.append(f"{name} was {version} at the last start and is {now} now")
    save_json(config, config_path)
    # The directory alone is then a model for infer, chat and eval.
    vocabulary, copy = _tokenizer_file(config.data.tokenizer), run_dir / "qwen.tiktoken"
    if vocabulary.is_file() and vocabulary.resolve() != copy.resolve():
        shutil.copyfile(vocabulary, copy)
    _write_atomically(manifest_path, json.dumps({"starts": [*starts, record]}, indent=1) + "\n")
    return notes


def differences(old: Any, new: Any, path: str = "") -> dict[str, str]:
    """Returns dotted field -> "field: was OLD, now NEW" for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = {}
        for key in sorted(set(old) | set(new)):
            where = f"{path}.{key}" if path else key
            found |= differences(old.get(key), new.get(key), where)
        return found
    if json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True):  # tuples are lists there
        return {}
    return {path: f"{path}: was {old}, now {new}"}


def truncate_metrics(path: Path, last_step: int) -> int:
    """Drops the lines after `last_step`, and a half-written last line; returns how many it drops.

    A run that was killed has logged steps that its newest checkpoint does not know. They will be
    made again, and the file must read as one run.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            is_kept = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError):  # cut off by a kill in the middle of the write
            is_kept = False
        if is_kept:
            kept.append(line + "\n")
        else:
            dropped += 1
    if dropped:
        _write_atomically(path, "".join(kept))
    return dropped


def _has_begun(run_dir: Path) -> bool:
    """Returns whether there is something to go on with; a failed first start binds no one."""
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    has_lines = metrics.exists() and metrics.stat().st_size > 0
    return has_lines or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _may_change(path: str) -> bool:
    return any(path == free or path.startswith(free + ".") for free in FREE_TO_CHANGE)


def _describe_start(config: TrainConfig, command: Sequence[str]) -> dict[str, Any]:
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": _commit(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "tokenizer_sha256": _tokenizer_digest(config.data.tokenizer),
        "config": to_dict(config),
    }


def _check_data(old: dict[str, Any], new: dict[str, Any], run_dir: Path) -> None:
    if old["tokenizer_sha256"] != new["tokenizer_sha256"]:
        raise ConfigError(
            f"the tokenizer file is not the one that {run_dir} was trained with: got sha256 "
            f"{new['tokenizer_sha256']}, expected {old['tokenizer_sha256']}; every token id would "
            "change its meaning: use the old file, or choose another run_dir"
        )


def _tokenizer_digest(path: str) -> str | None:
    file = _tokenizer_file(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _tokenizer_file(path: str) -> Path:
    return Path(path) / "qwen.tiktoken" if Path(path).is_dir() else Path(path)


def _commit() -> str | None:
    """Returns the commit of the code that runs, `+` added when files differ from it."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"],
            cwd=here,
            check=False,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):  # installed without git: the versions must do
        return None
    return described.stdout.strip() or None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not readable as JSON: {error}; restore it or choose another run_dir"
        ) from error


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
