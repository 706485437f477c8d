"""incidents.jsonl: one line for every step that went wrong, with what to look at afterwards."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwenvl_jax.training.guard import REASONS

Samples = Callable[[int], Sequence[str]]  # step -> the keys of the samples in its batch


class RunStopped(RuntimeError):
    """The run has ended itself; its state is saved."""


def no_samples(step: int) -> Sequence[str]:
    """Stands for data that cannot name their samples: the seed and the step find them again."""
    del step
    return ()


class Incidents:
    """Appends to run_dir/incidents.jsonl, on the first process only, and says the same in words."""

    def __init__(self, run_dir: str | Path, seed: int, samples: Samples = no_samples):
        self.path = Path(run_dir) / "incidents.jsonl"
        self._seed, self._samples = seed, samples

    def note(self, numbers: dict[str, Any], action: str, **facts: Any) -> str:
        """Writes one incident down; returns it as a line for the person who watches."""
        step, reason = numbers["step"], REASONS[numbers["verdict"]]
        seen = {name: numbers[name] for name in ("loss", "grad_norm", "spike_score")}
        if jax.process_index() == 0:
            samples = {"seed": self._seed, "samples": list(self._samples(step))}
            record = {"step": step, "reason": reason, "action": action} | seen | facts | samples
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, default=str) + "\n")
        told = ", ".join(f"{name} {value:.4g}" for name, value in seen.items())
        return f"step {step}: {reason} ({told}): {action}; see {self.path.name}"


def same_numbers(first: dict[str, Any], again: dict[str, Any]) -> bool:
    """Returns whether a step that ran twice on the same inputs came to the same result.

    To float32's tolerance, because on a GPU sums may come in another order.
    """
    names = ("loss", "grad_norm")
    a, b = [first[name] for name in names], [again[name] for name in names]
    return bool(np.allclose(a, b, rtol=1e-4, equal_nan=True))
