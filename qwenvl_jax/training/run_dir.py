"""The files of a run beside its checkpoints: config.json, manifest.json, metrics.jsonl, the lock.

`python train.py CONFIG` on the same directory goes on with the run, so the directory must be of
the same run: what decides the numbers may not differ, unless this start is allowed to by name.
Files that are not the run's own are left alone.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
from jax.experimental import multihost_utils

from qwenvl_jax.config import ConfigError, TrainConfig, save_json, to_dict
from qwenvl_jax.training.manifest import (
    describe_start,
    saved_inputs,
    tokenizer_file,
    version_notes,
)
from qwenvl_jax.training.skips import SkipRange, joined, parse_skips

EVALUATIONS = "evaluations.jsonl"

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
    "guard",
    "evaluation",
    "skip_steps",  # kept in the manifest
    "allow_change",
    "simulate_fault",
    "data.num_workers",
    "data.max_bad_fraction",
    "data.path",  # the place; its content is compared by fingerprint
    "data.tokenizer",  # the path; its content is compared by digest in the manifest
    "model.attention_backend",
    "model.attention_block",
    "model.remat",
    "model.vit_remat",
)


class RunDir:
    """A run directory that this process may write to, until it is closed.

    `notes` are lines for the person who started it, `skips` the steps that the run passes over.
    With several processes the first one writes; the others read the same directory.
    """

    def __init__(self, path: str, manifest: dict[str, Any], notes: Sequence[str], lock: IO | None):
        self.path, self.notes = Path(path), list(notes)
        self._manifest, self._lock = manifest, lock

    @property
    def skips(self) -> list[SkipRange]:
        return [(first, last) for first, last in self._manifest["skip_steps"]]

    @property
    def start(self) -> dict[str, Any]:
        """The manifest's entry of this start."""
        return self._manifest["starts"][-1]

    def ask_to_skip(self, texts: Sequence[str], first_step: int) -> None:
        """Passes over the ranges `A:B` that a person names, once the run stands at `first_step`.

        Raises: ConfigError for a range that this run has trained on already.
        """
        for first, last in parse_skips(texts):
            known = any(a <= first and last <= b for a, b in self.skips)
            if not known and first <= first_step:
                raise ConfigError(
                    f"skip_steps {first}:{last} comes too late: got a run that has made step "
                    f"{first_step}; resume from a checkpoint before step {first} (remove the later "
                    "ones from checkpoints/), or name later steps"
                )
            if not known:
                self.skip((first, last))

    def skip(self, steps: SkipRange) -> None:
        """Passes over these steps from now on; the manifest remembers it."""
        self._manifest["skip_steps"] = joined([*self.skips, steps])
        self._write()

    def end(self, **facts: Any) -> None:
        """Notes in the manifest how this start ended."""
        self.start["end"] = facts
        self._write()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()  # which unlocks it

    def _write(self) -> None:
        if jax.process_index() == 0:
            text = json.dumps(self._manifest, indent=1) + "\n"
            write_atomically(self.path / "manifest.json", text)


def open_run(config: TrainConfig, command: Sequence[str]) -> RunDir:
    """Creates or continues the run directory.

    Raises:
        ConfigError: another process trains in this directory; or it holds a run with other
            settings or inputs, which are all named.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    is_first = jax.process_index() == 0
    lock = take_lock(run_dir) if is_first else None
    try:
        record, notes = describe_start(config, command), []
        manifest = {"starts": [], "skip_steps": []}
        has_begun = _has_begun(run_dir)
        if has_begun and (run_dir / "config.json").exists():
            old = with_newer_settings(_read(run_dir / "config.json"), config)
            notes += _compare(old, to_dict(config), config)
        if has_begun and (run_dir / "manifest.json").exists():
            manifest |= _read(run_dir / "manifest.json")
            last = manifest["starts"][-1]
            notes += _compare_inputs(saved_inputs(last), record["inputs"], config)
            notes += version_notes(last["versions"], record["versions"])
        parse_skips(config.skip_steps)  # a wrong one is refused before anything is written
        manifest["starts"] = [*manifest["starts"], record]
        if jax.process_count() > 1:  # the others must have read before the first one writes
            multihost_utils.sync_global_devices("the run directory has been read")
        opened = RunDir(config.run_dir, manifest, notes, lock)
        if is_first:
            _write_start(opened, config)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return opened


def take_lock(run_dir: Path) -> IO:
    """Returns the open lock file of a directory; closing it, or dying, gives the lock back.

    Raises: ConfigError where another process holds it.
    """
    file = (run_dir / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise ConfigError(
            f"another process trains in {run_dir}: {holder}; stop it first, or choose another "
            "run_dir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def with_newer_settings(saved: Any, config: Any) -> Any:
    """Returns the saved fields of a config and, of settings that they lack, the defaults.

    An older version did not know them, and did what the default says.
    """
    if isinstance(config, tuple) and isinstance(saved, list) and len(saved) == len(config):
        return [with_newer_settings(a, b) for a, b in zip(saved, config, strict=True)]
    if not dataclasses.is_dataclass(config) or not isinstance(saved, Mapping):
        return saved
    whole = dict(saved)
    for field in dataclasses.fields(config):
        if field.name in saved:
            whole[field.name] = with_newer_settings(saved[field.name], getattr(config, field.name))
        elif field.default is not dataclasses.MISSING:
            is_group = dataclasses.is_dataclass(field.default)
            whole[field.name] = to_dict(field.default) if is_group else field.default
        elif field.default_factory is not dataclasses.MISSING:
            whole[field.name] = field.default_factory()
    return whole


def differences(old: Any, new: Any, path: str = "") -> dict[str, str]:
    """Returns dotted field -> "field: was OLD, now NEW" for every leaf that differs."""
    if isinstance(old, list | tuple) and isinstance(new, list | tuple) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = {}
        for key in sorted(set(old) | set(new)):
            where = f"{path}.{key}" if path else str(key)
            found |= differences(old.get(key), new.get(key), where)
        return found
    if json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True):  # tuples are lists there
        return {}
    return {path: f"{path}: was {old}, now {new}"}


def flat_fields(fields: Any, path: str = "") -> dict[str, Any]:
    """Returns dotted field -> leaf of nested dicts and sequences."""
    if isinstance(fields, list | tuple):
        fields = dict(enumerate(fields))
    if not isinstance(fields, Mapping):
        return {path: fields}
    flat = {}
    for key, value in fields.items():
        flat |= flat_fields(value, f"{path}.{key}" if path else str(key))
    return flat


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
        write_atomically(path, "".join(kept))
    return dropped


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _has_begun(run_dir: Path) -> bool:
    """Returns whether there is something to go on with; a failed first start binds no one."""
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    has_lines = metrics.exists() and metrics.stat().st_size > 0
    return has_lines or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def _write_start(opened: RunDir, config: TrainConfig) -> None:
    save_json(config, opened.path / "config.json")
    # The directory alone is then a model for infer, chat and eval.
    vocabulary, copy = tokenizer_file(config.data.tokenizer), opened.path / "qwen.tiktoken"
    if vocabulary.is_file() and vocabulary.resolve() != copy.resolve():
        shutil.copyfile(vocabulary, copy)
    opened._write()


def _compare(old: Any, new: Any, config: TrainConfig) -> list[str]:
    """Returns what has changed and may; raises for what may not."""
    changed = differences(old, new)
    may = (*FREE_TO_CHANGE, *config.allow_change)
    wrong = {path: text for path, text in changed.items() if not _is_named(path, may)}
    if wrong:
        names = " ".join(wrong)
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings: {'; '.join(wrong.values())}; "
            "give these back their old values, choose another run_dir, or say that you mean it "
            f"with --allow-change {names}"
        )
    return [f"changed since the last start: {text}" for text in changed.values()]


def _compare_inputs(
    old: dict[str, str | None], new: dict[str, str | None], config: TrainConfig
) -> list[str]:
    changed = {name: f"{name}: was {old[name]}, now {new.get(name)}" for name in old}
    changed = {name: text for name, text in changed.items() if old[name] != new.get(name)}
    wrong = [name for name in changed if name not in config.allow_change]
    if wrong:
        raise ConfigError(
            f"what {config.run_dir} was trained with has changed (sha256): "
            f"{'; '.join(changed[name] for name in wrong)}; use the old files, choose another "
            f"run_dir, or say that you mean it with --allow-change {' '.join(wrong)}"
        )
    return [f"changed since the last start (sha256): {text}" for text in changed.values()]


def _is_named(path: str, names: Sequence[str]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in names)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{path} is not readable as JSON: {error}; restore it or choose another run_dir"
        ) from error
