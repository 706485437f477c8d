"""What a start of a run was made of: code, versions, settings, inputs, command.

`manifest.json` holds one entry a start, and the ranges of steps that the run passes over.
"""

import datetime
import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qwenvl_jax.config import ConfigError, TrainConfig, to_dict
from qwenvl_jax.files import read_object
from qwenvl_jax.prompt.vocabulary import vocabulary_in

MANIFEST = "manifest.json"
_MANIFEST_WAYS_OUT = "restore it, remove it, or choose another run_dir"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")


def describe_start(config: TrainConfig, command: Sequence[str]) -> dict[str, Any]:
    """Returns the manifest's entry of one start, ready for JSON."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "commit": code_version(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "inputs": inputs_of(config),
        "config": to_dict(config),
    }


def inputs_of(config: TrainConfig) -> dict[str, str | None]:
    """Returns name -> fingerprint of what the run reads; None for what is not there."""
    vocabulary = vocabulary_in(Path(config.data.tokenizer))
    return {"tokenizer": None if vocabulary is None else fingerprint(vocabulary)}


def saved_inputs(start: dict[str, Any]) -> dict[str, str | None]:
    """Returns the fingerprints of an entry; before version 0.2 there was the tokenizer's alone."""
    return start["inputs"] if "inputs" in start else {"tokenizer": start["tokenizer_sha256"]}


def version_notes(last: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Returns a line for each package, and for the devices, that two starts do not share."""
    old, new = map(_made_on, (last, now))
    return [
        f"{name} was {before} at the last start and is {new.get(name, 'not there')} now: numbers "
        "may differ in the last digits"
        for name, before in old.items()
        if new.get(name) != before
    ]


def _made_on(start: dict[str, Any]) -> dict[str, Any]:
    names = {"devices": "what it runs on", "processes": "the number of processes"}
    machine = {told: start[name] for name, told in names.items() if name in start}
    return start["versions"] | machine


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """Returns what manifest.json holds, of no start where there is none. Raises: ConfigError."""
    path, empty = run_dir / MANIFEST, {"starts": [], "skip_steps": []}
    if not path.exists():
        return empty
    found = empty | read_object(path, _MANIFEST_WAYS_OUT)
    starts, skips = found["starts"], found["skip_steps"]
    is_whole = isinstance(starts, list) and all(map(_is_start, starts))
    if not is_whole or not isinstance(skips, list) or not all(map(_is_range, skips)):
        raise ConfigError(
            f"{path} is no manifest of a run: expected an object with a list `starts`, each with "
            "versions and inputs, and a list `skip_steps` of pairs of steps; "
            f"{_MANIFEST_WAYS_OUT}"
        )
    return found


def tells_of_saves(manifest: dict[str, Any]) -> bool:
    """Returns whether an earlier start has saved a checkpoint."""
    return any(s.get("saved") or s.get("end", {}).get("step") for s in manifest["starts"])


def saved_config(run_dir: Path, last: dict[str, Any] | None) -> Any:
    """Returns the settings of the last start, from config.json or else the manifest; or None."""
    path = run_dir / "config.json"
    if path.exists():
        return read_object(path, "restore it, or remove it: manifest.json has the settings too")
    return last and last.get("config")


def fingerprint(path: Path) -> str | None:
    """Returns a sha256: of a file's bytes, or of a folder's names, sizes and small files' bytes.

    Data files of a folder are not read: gigabytes, and their sizes are in the sum. None: no such
    path.
    """
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path).as_posix()} {size}\n".encode())
        if file.suffix == ".json":  # indices and dataset descriptions
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _is_start(start: Any) -> bool:
    if not isinstance(start, dict) or not isinstance(start.get("versions"), dict):
        return False
    has_inputs = isinstance(start.get("inputs"), dict) or "tokenizer_sha256" in start
    return has_inputs and all(isinstance(start.get(name, {}), dict) for name in ("data", "end"))


def _is_range(steps: Any) -> bool:
    return isinstance(steps, list) and [type(step) for step in steps] == [int, int]


def code_version() -> str | None:
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
