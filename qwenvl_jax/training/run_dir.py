"""The files of a run beside its checkpoints: config.json, manifest.json, metrics.jsonl, the lock.

`python train.py CONFIG` on the same directory goes on with the run, so the directory must be of
the same run: what decides the numbers may not differ, unless this start is allowed to by name.
Files that are not the run's own are left alone.
"""

import contextlib
import filecmp
import json
import shlex
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.checkpoint.weights import TOKENIZER
from qwenvl_jax.config import ConfigError, TrainConfig, to_dict
from qwenvl_jax.data.unchanged import CONTENT, DATA, DATA_WAYS_OUT
from qwenvl_jax.files import appearing, json_text, read_object, read_text, replace_text
from qwenvl_jax.prompt.vocabulary import vocabulary_in
from qwenvl_jax.training.changes import differences, flat_fields, with_newer_settings
from qwenvl_jax.training.manifest import (
    MANIFEST,
    describe_start,
    read_manifest,
    saved_config,
    saved_inputs,
    tells_of_saves,
    version_notes,
)
from qwenvl_jax.training.run_files import (
    EVALUATIONS,
    LINES_WAYS_OUT,
    NO_MANIFEST,
    check_files,
    give_back_data,
    has_begun,
)
from qwenvl_jax.training.run_lock import RunLock
from qwenvl_jax.training.skips import SkipRange, joined, parse_skips
from qwenvl_jax.words import did_you_mean

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
# What decides the shapes of the weights, which a run cannot change, nor one that begins from it.
SIZES = (
    *(f"model.vision.{x}" for x in ("width", "num_layers", "num_heads", "mlp_dim", "patch_size")),
    "model.vision.table_side",
    *(f"model.adapter.{x}" for x in ("num_queries", "num_heads")),
    *(f"model.decoder.{x}" for x in ("width", "num_layers", "num_heads", "head_dim", "mlp_dim")),
    "model.decoder.vocab_size",
)
# What decides the arrays that a checkpoint holds beside those: one that begins from a run may.
OF_A_NEW_RUN = ("model.lora.rank", "model.lora.targets", "frozen_dtype")


class RunDir:
    """A run directory that this process may write to, until it is closed.

    `notes` are lines for the person who started it, `skips` the steps that the run passes over.
    With several processes the first one writes; the others read the same directory. Nothing of the
    run is written before `begin`, but for a data.json that was lost: a start that is refused or
    cannot load leaves it as it was.
    """

    def __init__(
        self,
        config: TrainConfig,
        manifest: dict[str, Any],
        notes: Sequence[str],
        lock: RunLock | None,
    ):
        self.path, self.notes = Path(config.run_dir), list(notes)
        self._config, self._manifest, self._lock = config, manifest, lock

    @property
    def skips(self) -> list[SkipRange]:
        return [(first, last) for first, last in self._manifest["skip_steps"]]

    @property
    def start(self) -> dict[str, Any]:
        """The manifest's entry of this start."""
        return self._manifest["starts"][-1]

    def check_new(self) -> None:
        """Raises ConfigError where an earlier start has saved: its checkpoints are not there."""
        if tells_of_saves(self._manifest):
            raise ConfigError(
                f"{self.path} has no checkpoint, but its manifest.json tells of saves: got an "
                "empty or missing folder checkpoints/; give it back (is a disk not mounted?), name "
                "another run_dir, or empty this one to begin anew here"
            )

    def evaluated_steps(self) -> set[int]:
        """Returns the steps after which the run was evaluated."""
        path = self.path / EVALUATIONS
        if not path.exists():
            return set()
        return {json.loads(line)["step"] for line in path.read_text("utf-8").splitlines()}

    def ask_to_skip(self, texts: Sequence[str], first_step: int) -> None:
        """Passes over the ranges `A:B` that a person names, once the run stands at `first_step`.

        Raises: ConfigError for a range that this run has trained on already.
        """
        asked = [steps for steps in parse_skips(texts) if not self._is_skipped(*steps)]
        for first, last in asked:
            # What lies behind the run may be asked for again, as far as it was passed over.
            made = [
                step for step in range(first, first_step + 1) if not self._is_skipped(step, step)
            ]
            if made:
                raise ConfigError(
                    f"skip_steps {first}:{last} comes too late: got a run that has made step "
                    f"{made[-1]}; resume from a checkpoint before step {first} (remove the later "
                    "ones from checkpoints/), or name later steps"
                )
        self._manifest["skip_steps"] = joined([*self.skips, *asked])

    def begin(self) -> None:
        """Writes what this start is, all or nothing: from now on the directory is this run's."""
        if jax.process_index() > 0:
            return
        if (data := self.path / DATA).exists():  # which is of now: the data are open
            self.start["data"] = read_object(data, DATA_WAYS_OUT)
        vocabulary = vocabulary_in(Path(self._config.data.tokenizer))
        copy = self.path / TOKENIZER
        with contextlib.ExitStack() as together:
            config = together.enter_context(appearing(self.path / "config.json"))
            config.write_text(json_text(to_dict(self._config)), encoding="utf-8")
            # The directory alone is then a model for infer, chat and eval.
            if vocabulary and not (copy.is_file() and filecmp.cmp(vocabulary, copy, shallow=False)):
                shutil.copyfile(vocabulary, together.enter_context(appearing(copy)))
            self._write()

    def saved(self) -> None:
        """Notes that a checkpoint of this start is on the disk."""
        self.start["saved"] = True
        self._write()

    def skip(self, steps: SkipRange) -> None:
        """Passes over these steps from now on; the manifest remembers it."""
        self._manifest["skip_steps"] = joined([*self.skips, steps])
        self._write()

    def end(self, **facts: Any) -> None:
        """Notes in the manifest how this start ended."""
        self.start["end"] = facts
        self._write()

    def is_lost(self) -> bool:
        """Returns whether the directory is not this start's any more; only the first process knows.

        Raises: ConfigError where another process trains in it.
        """
        return self._lock is not None and self._lock.is_lost()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _is_skipped(self, first: int, last: int) -> bool:
        return any(a <= first and last <= b for a, b in self.skips)

    def _write(self) -> None:
        if jax.process_index() == 0:
            replace_text(self.path / MANIFEST, json_text(self._manifest))


def open_run(config: TrainConfig, command: Sequence[str]) -> RunDir:
    """Opens the run directory, new or not, and checks that it is this run's.

    Raises:
        ConfigError: another process trains in this directory; or it holds a run with other
            settings or inputs, which are all named.
    """
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run_dir {config.run_dir!r} cannot be made ({error.strerror}): name a folder, new or "
            "of an earlier start, where you may write"
        ) from error
    is_first = jax.process_index() == 0
    lock = RunLock(run_dir) if is_first else None
    try:
        record, notes = describe_start(config, command), []
        manifest = read_manifest(run_dir)
        is_known = has_begun(run_dir, manifest)
        if is_known:
            notes += check_files(run_dir, config)
            if is_first:
                notes += give_back_data(run_dir, manifest)
        else:
            manifest["starts"], manifest["skip_steps"] = [], []
        last = manifest["starts"][-1] if manifest["starts"] else None
        now, old = to_dict(config), saved_config(run_dir, last) if is_known else None
        if old is not None:
            old = with_newer_settings(old, config)
        elif is_known:
            notes.append(
                f"{run_dir} has neither config.json nor manifest.json: that the settings are those "
                "of its earlier starts is up to you"
            )
        # What the run had and this start has no more can be changed as well.
        known = [*flat_fields(now), *flat_fields(old), *record["inputs"], CONTENT, NO_MANIFEST]
        _check_allowed(config.allow_change, known)
        if old is not None:
            notes += _compare(old, now, config)
        if last is not None:
            notes += _compare_inputs(saved_inputs(last), record["inputs"], config)
            notes += version_notes(last, record)
        parse_skips(config.skip_steps)  # a wrong one is told before anything is loaded
        manifest["starts"] = [*manifest["starts"], record]
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return RunDir(config, manifest, notes, lock)


def truncate_metrics(path: Path, last_step: int) -> int:
    """Drops the lines after `last_step`, and a half-written last line; returns how many it drops.

    A run that was killed has logged steps that its newest checkpoint does not know. They will be
    made again, and the file must read as one run.

    Raises: ConfigError where it is no text.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in read_text(path, LINES_WAYS_OUT).splitlines():
        try:
            is_kept = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError):  # cut off by a kill in the middle of the write
            is_kept = False
        if is_kept:
            kept.append(line + "\n")
        else:
            dropped += 1
    if dropped:
        replace_text(path, "".join(kept))
    return dropped


def _check_allowed(names: Sequence[str], known: Sequence[str]) -> None:
    """Raises ConfigError for a name in `allow_change` that nothing is called."""
    for name in names:
        if any(_is_named(path, [name]) for path in known):
            continue
        hint = did_you_mean(name, [*known, *{x.split(".")[0] for x in known}])
        raise ConfigError(
            f"allow_change names no setting: got {name!r}, expected one as a refused start names "
            f"it, e.g. optimizer.peak_lr, data or tokenizer{hint}"
        )


def _compare(old: Any, new: Any, config: TrainConfig) -> list[str]:
    """Returns what has changed and may; raises for what may not."""
    changed = differences(old, new)
    may = (*FREE_TO_CHANGE, *config.allow_change)
    wrong = {path: text for path, text in changed.items() if not _is_named(path, may)}
    if wrong:
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings: {'; '.join(wrong.values())}; "
            f"{_ways_out(wrong, config.run_dir)}"
        )
    if "init" in changed:
        changed["init"] += " (not read: the run goes on from its own checkpoint)"
    return [f"changed since the last start: {text}" for text in changed.values()]


def _ways_out(wrong: Collection[str], run_dir: str) -> str:
    """Returns what to do about settings that are not those of the run."""
    # The table as a whole: its rows have numbers for names.
    names = list(dict.fromkeys("parameters" if _is_named(x, ["parameters"]) else x for x in wrong))
    sizes = [name for name in names if _is_named(name, SIZES)]
    kinds = [name for name in names if _is_named(name, OF_A_NEW_RUN)]
    others = [name for name in names if name not in (*sizes, *kinds)]
    ways = ["give these back their old values", "choose another run_dir"]
    if others:
        ways.append(f"say that you mean it with --allow-change {' '.join(others)}")
    told = f"{', '.join(ways[:-1])}{',' if others else ''} or {ways[-1]}"
    if sizes:
        return f"{told}; no run can begin from weights of another {', '.join(sizes)}"
    cases = [f"for another {', '.join(kinds)}"] if kinds else []
    if "parameters" in others:
        told += "; that serves other rates and decays only"
        cases.append("where other parameters train than before")
    if not cases:
        return told
    return (
        f"{told}; {' and '.join(cases)} begin anew from what this run has learned, with another "
        f"--run-dir and --init={shlex.quote(run_dir)}"
    )


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
