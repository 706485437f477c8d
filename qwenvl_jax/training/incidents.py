"""incidents.jsonl: one line each time a step goes wrong, with what to look at afterwards."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwenvl_jax.files import Lines, json_line, name_for
from qwenvl_jax.training.guard import REASONS


class RunStopped(RuntimeError):
    """The run has ended itself; its state is saved."""


class Incidents:
    """Appends to run_dir/incidents.jsonl, and says the same in words.

    Seed and step of a line make its batch again. `samples` names what was in it by row; each
    process knows its own rows only, so all but the first write a file of their own beside it.
    """

    def __init__(self, run_dir: str | Path, seed: int):
        self.path = Path(run_dir) / name_for(jax.process_index(), "incidents.jsonl")
        self._seed = seed
        self._lines = Lines(self.path)

    def note(self, numbers: dict[str, Any], action: str, **facts: Any) -> str:
        """Writes one incident down; returns it as a line for the person who watches."""
        step, reason = numbers["step"], REASONS[numbers["verdict"]]
        seen = {name: numbers[name] for name in ("loss", "grad_norm", "spike_score")}
        by_task = {name: value for name, value in numbers.items() if name.startswith("loss/")}
        record = {"step": step, "seed": self._seed, "reason": reason, "action": action}
        record |= seen | by_task | facts
        told = ", ".join(f"{name} {value:.4g}" for name, value in seen.items())
        text = f"step {step}: {reason} ({told}): {action}"
        try:
            self._lines.write(json_line(record, default=str))
        except OSError as error:
            return f"{text}; NOT WRITTEN into {self.path.name} yet: {error}"
        return f"{text}; see {self.path.name}"


def same_numbers(first: dict[str, Any], again: dict[str, Any]) -> bool:
    """Returns whether a step that ran twice on the same inputs came to the same result.

    To float32's tolerance, because on a GPU sums may come in another order.
    """
    names = ("loss", "grad_norm")
    a, b = [first[name] for name in names], [again[name] for name in names]
    return bool(np.allclose(a, b, rtol=1e-4, equal_nan=True))
