"""Prints how long a source's rows are, their pictures and tasks, and how well they would pack.

SOURCE is a .json or .jsonl file of conversations, a prepared folder or a TFDS folder. Lengths are
counted with a vocabulary: name the one of the model that you train. Dialogues of more than --length
tokens are packed without their last turns, as the fine-tuning configs do.

Examples:
    qwenvl data stats my.json --tokenizer Qwen-VL-Chat
    qwenvl data stats prepared/captions --tokenizer Qwen-VL --length 2048 --max-images 8 --num 10000
    qwenvl data stats my.json --json
"""

import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qwenvl_jax.cli.errors import SUCCESS, leave, run_command
from qwenvl_jax.cli.options import check_positive, parse_options
from qwenvl_jax.cli.row_passes import pass_over
from qwenvl_jax.words import counted

if TYPE_CHECKING:
    import numpy as np

    from qwenvl_jax.data.record import Source
    from qwenvl_jax.data.row_sizes import RowSizes
    from qwenvl_jax.prompt.tokenizer import Tokenizer

NOTHING_USABLE = 1  # the exit code
PERCENTILES = (0, 25, 50, 75, 90, 99, 100)
_BINS = 12
_BAR = 40  # characters of the longest
_LONGEST = 5  # rows that are named
_REASONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class StatsOptions:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A .json or .jsonl file, a prepared folder or a TFDS folder."""
    tokenizer: Path | None = None
    """A qwen.tiktoken file or a folder with one; the small shipped model's if left out."""
    slots: int | None = None
    """Tokens a picture; of the tokenizer's config.json, or 256."""
    length: int = 2048
    """Tokens of a packed row."""
    max_images: int = 8
    """Pictures of a packed row."""
    cut_turns: bool = True
    """Whether a dialogue longer than a row loses its last turns or is left out: data.cut_turns."""
    num: int | None = None
    """Measure so many rows, drawn at random; all if left out."""
    seed: int = 0
    """Which rows are drawn."""
    pictures: Path | None = None
    """The folder that picture paths of a conversation file start from; its own if left out."""
    processes: int | None = None
    """Processes to spread the rows over; as many as there are cores, or one for few rows."""
    json: bool = False
    """Print the figures as JSON."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 where no row can be used."""
    return run_command("data stats", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(StatsOptions, argv, "qwenvl data stats", __doc__)
    check_positive(options, "length", "max_images", "num")
    from qwenvl_jax.cli.vocabulary import open_tokenizer
    from qwenvl_jax.data.row_sizes import join_sizes, measure_rows
    from qwenvl_jax.data.sources.open import open_source

    tokenizer = open_tokenizer(options.tokenizer, options.slots)
    source = open_source(options.source, options.pictures)
    indices = _drawn(len(source), options.num, options.seed)
    cut_to = options.length if options.cut_turns else None
    work = functools.partial(measure_rows, source, tokenizer, indices, cut_to)
    parts = list(pass_over(work, len(indices), options.processes, "rows"))
    figures = _figures(options, source, tokenizer, indices, join_sizes(parts))
    print(json.dumps(figures, ensure_ascii=False) if options.json else _report(options, figures))
    return SUCCESS if "tokens" in figures else NOTHING_USABLE


def _drawn(num_rows: int, num: int | None, seed: int) -> Sequence[int]:
    """Returns which rows are measured, in their order."""
    if num is None or num >= num_rows:
        return range(num_rows)
    return sorted(random.Random(seed).sample(range(num_rows), num))


def _figures(
    options: StatsOptions,
    source: "Source",
    tokenizer: "Tokenizer",
    indices: Sequence[int],
    sizes: "RowSizes",
) -> dict[str, Any]:
    """Returns everything that is told, as JSON data."""
    import numpy as np

    from qwenvl_jax.data.row_sizes import predicted_fill

    is_usable = sizes.tokens >= 0
    tokens = sizes.tokens[is_usable]
    figures: dict[str, Any] = {
        "source": options.source,
        "fingerprint": source.fingerprint,
        "rows": len(source),
        "measured": len(indices),
        "unusable": len(sizes.reasons),
        "reasons": sizes.reasons[:_REASONS],
        "tokenizer": str(options.tokenizer or "the small shipped model"),
        "vocabulary": tokenizer.vocab_size,
        "slots": tokenizer.slots,
    }
    if len(tokens) == 0:
        return figures
    longest = np.argsort(np.where(is_usable, -sizes.tokens, 1), kind="stable")[:_LONGEST]
    fill = predicted_fill(sizes, options.length, options.max_images)
    return figures | {
        "tokens": {f"p{p}": int(np.percentile(tokens, p)) for p in PERCENTILES}
        | {"mean": float(tokens.mean()), "total": int(tokens.sum(dtype=np.int64))},
        "learnt": int(sizes.learnt[is_usable].sum(dtype=np.int64)),
        "histogram": _histogram(tokens),
        "pictures": {
            str(k): n for k, n in sorted(Counter(sizes.pictures[is_usable].tolist()).items())
        },
        "tasks": dict(Counter(task for task in sizes.tasks if task).most_common()),
        "longest": [
            {"key": source[int(indices[i])].key, "tokens": int(sizes.tokens[i])}
            for i in longest.tolist()
            if is_usable[i]
        ],
        "packing": {
            "length": options.length,
            "max_images": options.max_images,
            "cut_turns": options.cut_turns,
        }
        | fill._asdict(),
    }


def _histogram(tokens_N: "np.ndarray") -> list[dict[str, int]]:
    """Returns counts of equal steps of a round width up to the 99th percentile, then the rest."""
    import numpy as np

    reach = max(1.0, float(np.percentile(tokens_N, 99)) / (_BINS - 1))
    scale = 10 ** int(np.floor(np.log10(reach)))
    width = int(next(step * scale for step in (1, 2, 5, 10) if step * scale >= reach))
    first = int(tokens_N.min()) // width
    num_bins = min(_BINS, int(tokens_N.max()) // width - first + 1)
    places = np.minimum(tokens_N // width - first, num_bins - 1)
    counts = np.bincount(places, minlength=num_bins).tolist()
    return [
        {"from": (first + i) * width, "to": (first + i + 1) * width - 1, "rows": count}
        for i, count in enumerate(counts)
    ]


def _report(options: StatsOptions, figures: dict[str, Any]) -> str:
    """Returns the figures as text."""
    drawn = f", {figures['measured']:,} of them measured" * (figures["measured"] < figures["rows"])
    lines = [
        f"{figures['source']}: {counted(figures['rows'], 'row')}{drawn}",
        f"counted with {figures['tokenizer']}: {figures['vocabulary']:,} tokens in the vocabulary, "
        f"{figures['slots']} slots a picture",
    ]
    if options.tokenizer is None:
        lines.append("name your model's with --tokenizer: another one gives other lengths")
    if figures["unusable"]:
        lines += ["", f"unusable: {counted(figures['unusable'], 'row')}"]
        lines += [f"  {reason}" for reason in figures["reasons"]]
    if "tokens" not in figures:
        return "\n".join([*lines, "no row can be used"])
    tokens = figures["tokens"]
    names = {"p0": "least", "p50": "median", "p100": "most"}
    spread = ", ".join(
        f"{names.get(name, f'{name[1:]} %')} {tokens[name]:,}"
        for name in (f"p{p}" for p in PERCENTILES)
    )
    share = figures["learnt"] / tokens["total"]
    lines += [
        "",
        f"tokens a row: {spread}; mean {tokens['mean']:,.0f}",
        f"tokens in all: {tokens['total']:,}, of which {share:.0%} are learnt",
        *_bars(figures["histogram"], tokens["p100"]),
        "",
        "pictures a row: "
        + ", ".join(
            f"{counted(count, 'row')} with {number}"
            for number, count in figures["pictures"].items()
        ),
        "tasks: " + ", ".join(f"{task} {count:,}" for task, count in figures["tasks"].items()),
        "",
        "longest rows:",
        *(f"  {row['tokens']:>7,}  {row['key']}" for row in figures["longest"]),
        "",
        _packing_line(figures["packing"]),
    ]
    return "\n".join(lines)


def _bars(histogram: list[dict[str, int]], most: int) -> list[str]:
    highest = max(part["rows"] for part in histogram)
    lines = []
    for part in histogram:
        end = max(part["to"], most) if part is histogram[-1] else part["to"]
        bar = "#" * -(-part["rows"] * _BAR // highest)
        lines.append(f"  {part['from']:>7,} to {end:>7,}  {part['rows']:>9,}  {bar}".rstrip())
    return lines


def _packing_line(packing: dict[str, Any]) -> str:
    limits = (
        f"{counted(packing['length'], 'token')} and {counted(packing['max_images'], 'picture')}"
    )
    line = f"no sample fits into a row of {limits}"
    if packing["rows"]:
        line = (
            f"packed into {counted(packing['rows'], 'row')} of {limits}: {packing['tokens']:.1%} "
            f"of the token places and {packing['images']:.1%} of the picture places filled, "
            f"{packing['samples_per_row']:.1f} samples a row"
        )
    if packing["cut"]:
        line += f"; cut at their last turns: {counted(packing['cut'], 'dialogue')}"
    if packing["too_long"]:
        line += f"; {packing['too_long']:,} too long or with too many pictures"
    return line


if __name__ == "__main__":
    leave(main())
