"""Lists every problem of a fine-tuning file at once, with the ids of its rows.

Pictures that are missing or broken, boxes that are not in 0..999, reversed or malformed, tags that
are not closed, wrong roles and picture numbers, empty answers, control tokens in texts, equal ids,
and, where a vocabulary is given, rows that do not fit. Ends with 0 where the file is clean, with 1
where it has problems.

Examples:
    qwenvl data lint my.json
    qwenvl data lint my.json --pictures photos --tokenizer Qwen-VL-Chat --length 2048
    qwenvl data lint my.jsonl --processes 8 --json > problems.json
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from qwenvl_jax.cli.errors import SUCCESS, leave, run_command
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.cli.row_passes import pass_over
from qwenvl_jax.config import ConfigError
from qwenvl_jax.words import counted

if TYPE_CHECKING:
    from qwenvl_jax.data.lint.problems import Problem
    from qwenvl_jax.data.lint.rows import Checks
    from qwenvl_jax.data.sources.conversations import Conversations

PROBLEMS = 1  # the exit code where there are some


@dataclasses.dataclass(frozen=True, kw_only=True)
class LintOptions:
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The fine-tuning file: a JSON list, or one row a line."""
    tokenizer: Path | None = None
    """A qwen.tiktoken file or a folder with one: rows that do not fit are found by it, and
    not looked for if left out."""
    length: int = 2048
    """The longest row in tokens, slots of pictures included."""
    slots: int | None = None
    """Tokens a picture; of the tokenizer's config.json, or 256."""
    pictures: Path | None = None
    """The folder that picture paths start from; the file's own if left out."""
    quick: bool = False
    """Look only whether pictures are there and begin like pictures; do not decode them."""
    processes: int | None = None
    """Processes to spread the rows over; as many as there are cores, or one for few rows."""
    show: int = 5
    """Examples of each kind; --json has all."""
    json: bool = False
    """Print everything as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 for a clean file, 1 for one with problems."""
    return run_command("data lint", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(LintOptions, argv, "qwenvl data lint", __doc__)
    if options.length <= 0 or options.show < 0:
        raise ConfigError(
            "--length must be positive and --show not negative: got "
            f"{options.length} and {options.show}"
        )
    if options.file.is_dir():
        raise ConfigError(
            f"lint takes a file: got the folder {str(options.file)!r}; name a .json or .jsonl file"
        )
    from qwenvl_jax.cli.vocabulary import open_tokenizer
    from qwenvl_jax.data.lint.problems import Problem
    from qwenvl_jax.data.lint.rows import Checks
    from qwenvl_jax.data.sources.conversations import Conversations
    from qwenvl_jax.data.sources.json_rows import find_rows

    tokenizer = (
        None if options.tokenizer is None else open_tokenizer(options.tokenizer, options.slots)
    )
    table = find_rows(options.file)
    source = Conversations(options.file, options.pictures, rows=table)
    checks = Checks(tokenizer, options.length, not options.quick)
    problems = _problems(source, checks, options.processes)
    if table.damage is not None:
        damage = Problem("file", None, None, None, None, table.damage)
        problems = itertools.chain([damage], problems)
    if options.json:
        return _print_json(options.file, len(source), problems)
    has_problems = _print_groups(options, len(source), problems)
    if tokenizer is None:
        print("lengths were not checked: give --tokenizer for that")
    return PROBLEMS if has_problems else SUCCESS


def _problems(
    source: "Conversations", checks: "Checks", processes: int | None
) -> "Iterator[Problem]":
    """Yields all problems: those of rows in their order, then ids that rows share."""
    import numpy as np

    from qwenvl_jax.data.lint.rows import check_rows, duplicate_ids

    work = functools.partial(check_rows, source, checks)
    hashes = [np.zeros(0, np.uint64)]
    for checked in pass_over(work, len(source), processes, "rows"):
        hashes.append(checked.id_hashes)
        yield from checked.problems
    yield from duplicate_ids(source, np.concatenate(hashes))


def _print_groups(options: LintOptions, num_rows: int, problems: "Iterator[Problem]") -> bool:
    """Prints the kinds of problems with some examples each; returns whether there are any."""
    from qwenvl_jax.data.lint.problems import KINDS

    counts: Counter[str] = Counter()
    shown: dict[str, list[Problem]] = {kind: [] for kind in KINDS}
    rows: set[int | None] = set()
    for problem in problems:
        counts[problem.kind] += 1
        rows.add(problem.row)
        if len(shown[problem.kind]) < options.show:
            shown[problem.kind].append(problem)
    num_bad = len(rows - {None})
    if not counts:
        print(f"{options.file}: {counted(num_rows, 'row')}, no problems")
        return False
    print(
        f"{options.file}: {counted(counts.total(), 'problem')}, "
        f"in {num_bad:,} of {counted(num_rows, 'row')}",
        end="\n\n",
    )
    for kind in (kind for kind in KINDS if counts[kind]):
        print(f"{kind}: {counts[kind]:,} - {KINDS[kind]}")
        for problem in shown[kind]:
            print(f"  {_printable(_place(problem) + problem.detail)}")
        if counts[kind] > len(shown[kind]):
            print(f"  and {counts[kind] - len(shown[kind]):,} more")
        print()
    return True


def _place(problem: "Problem") -> str:
    if problem.row is None:
        return ""
    name = "" if problem.id is None else f", id {problem.id[:40]!r}"
    turn = "" if problem.turn is None else f", turn {problem.turn}"
    return f"row {problem.row} (line {problem.line}{name}{turn}): "


def _printable(text: str) -> str:
    """Returns one line that changes nothing on a terminal, whatever a row holds."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _print_json(file: Path, num_rows: int, problems: "Iterator[Problem]") -> int:
    """Prints one JSON object, problem by problem, so that a million of them need no memory."""
    counts: Counter[str] = Counter()
    sys.stdout.write(f'{{"file": {json.dumps(str(file))}, "rows": {num_rows}, "problems": [')
    for problem in problems:
        separator = ",\n" if counts.total() else "\n"
        counts[problem.kind] += 1
        sys.stdout.write(separator + json.dumps(problem._asdict(), ensure_ascii=False))
    sys.stdout.write(f'\n], "counts": {json.dumps(counts)}}}\n')
    return PROBLEMS if counts else SUCCESS


if __name__ == "__main__":
    leave(main())
