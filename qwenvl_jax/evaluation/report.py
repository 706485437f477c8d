"""Scores for people and for files: a table in the terminal, Markdown, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qwenvl_jax.evaluation.marks import Score

HEADINGS = ("measure", "score", "items")
APART = ("seen in training", "never", "items")  # only where somebody says what training had


def percent(value: float | None) -> str:
    """Returns `87.5 %`, or a dash where nothing was measured."""
    return "-" if value is None else f"{100 * value:.1f} %"


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """Returns the headings, and then the cells of each score, as text."""
    whole = [(score.measure, percent(score.value), str(score.count)) for score in scores]
    if not any(score.is_told_apart for score in scores):
        return [HEADINGS, *whole]
    apart = [
        (percent(score.known_value), percent(score.new_value), str(score.new_count or "-"))
        for score in scores
    ]
    return [a + b for a, b in zip([HEADINGS, *whole], [APART, *apart], strict=True)]


def to_table(title: str, scores: Sequence[Score]) -> Table:
    """Returns the scores as a table for the terminal."""
    # text of its own kind: names of folders and rows may look like markup
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    headings, *lines = rows(scores)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    for cells in lines:
        table.add_row(*map(Text, cells))
    return table


def to_markdown(scores: Sequence[Score]) -> str:
    """Returns the scores as a Markdown table."""
    headings, *lines = rows(scores)
    rule = ("---", *["---:"] * (len(headings) - 1))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (headings, rule, *lines))


def to_json(
    run: Mapping[str, Any], scores: Sequence[Score], answers: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns what was run, the scores, and every answer beside what was expected."""
    return {
        "run": dict(run),
        "scores": [score._asdict() for score in scores],
        "answers": [dict(answer) for answer in answers],
    }


def write(folder: Path, name: str, page: str, record: Mapping[str, Any]) -> list[Path]:
    """Writes `name.md` and `name.json` into a folder, made if need be; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    markdown, data = folder / f"{name}.md", folder / f"{name}.json"
    markdown.write_text(page, encoding="utf-8")
    data.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [markdown, data]
