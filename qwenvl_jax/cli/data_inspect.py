"""Writes one page of training samples, as the model meets them, to look at in a browser.

Each sample shows its pictures with boxes and quads drawn, its text with what is learnt in colour,
and its sizes. SOURCE is a .json or .jsonl file of conversations, a prepared folder, a TFDS folder,
or `scenes`, `collages` or `documents`, which are made. The page needs no other file.

Examples:
    qwenvl data inspect my.json --tokenizer Qwen-VL-Chat --output samples.html
    qwenvl data inspect my.json --num 40 --packed --length 2048 --max-images 8
    qwenvl data inspect scenes --task ref_grounding --seed 3
    qwenvl data inspect collages --generated.emoji --generated.side 224
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qwenvl_jax.cli.errors import SUCCESS, leave, run_command
from qwenvl_jax.cli.opening import SHIPPED_MODEL
from qwenvl_jax.cli.options import check_positive, parse_options
from qwenvl_jax.config import ConfigError
from qwenvl_jax.data.sources.generated import NAMES, GeneratedOptions, open_generated
from qwenvl_jax.words import counted, did_you_mean

if TYPE_CHECKING:
    from qwenvl_jax.data.sample_page import Packing, Shown
    from qwenvl_jax.prompt.tokenizer import Tokenizer

SCENES = "scenes"
_SCENE_SIDE = 448
_GENERATED_ROWS = 1_000_000  # of which some are drawn
_MAX_LOOKS = 20_000  # rows that are looked at for those of a task


@dataclasses.dataclass(frozen=True, kw_only=True)
class InspectOptions:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A .json or .jsonl file, a prepared folder, a TFDS folder, scenes, collages, or documents."""
    num: int = 12
    """Samples to show, drawn at random."""
    seed: int = 0
    """Which ones; the same seed shows the same samples."""
    task: str | None = None
    """Only samples of this task; of all if left out."""
    output: Path = Path("samples.html")
    """The page to write."""
    packed: bool = False
    """Also pack the samples into rows and show where each begins and ends."""
    length: int = 2048
    """Tokens of a packed row."""
    max_images: int = 8
    """Pictures of a packed row."""
    mask: Literal["released", "assistant_only"] = "released"
    """Which tokens of a dialogue are learnt."""
    tokenizer: Path | None = None
    """A qwen.tiktoken file or a folder with one; the small shipped model's if left out."""
    slots: int | None = None
    """Tokens a picture; of the tokenizer's config.json, or 256."""
    pictures: Path | None = None
    """The folder that picture paths of a conversation file start from; its own if left out."""
    generated: GeneratedOptions = dataclasses.field(default_factory=GeneratedOptions)
    """What collages or documents are made of."""

    def check(self) -> None:
        """Raises ConfigError for options that cannot be served."""
        check_positive(self, "num", "length")
        if self.max_images < 0:
            raise ConfigError(f"--max-images must not be negative: got {self.max_images}")
        is_made = self.source in NAMES and self.source != SCENES  # those are shown as samples
        if not is_made and self.generated != GeneratedOptions():
            raise ConfigError(
                f"--generated.* has no effect on {self.source!r}: expected collages or documents"
            )
        hint = did_you_mean(self.source, NAMES)
        if hint and self.source not in NAMES and not Path(self.source).exists():
            raise ConfigError(
                f"no data at {self.source!r}: expected a file, a folder or what is made{hint}"
            )
        if not self.output.parent.is_dir():
            raise ConfigError(
                f"no folder for the page: got {str(self.output)!r}; make {self.output.parent} first"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("data inspect", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(InspectOptions, argv, "qwenvl data inspect", __doc__)
    options.check()
    from qwenvl_jax.cli.vocabulary import open_tokenizer
    from qwenvl_jax.data.sample_page import sample_page

    tokenizer = open_tokenizer(options.tokenizer, options.slots)
    if options.source == SCENES:
        samples, origin = list(_scene_samples(options, tokenizer)), "drawn scenes"
    else:
        samples, origin = _row_samples(options, tokenizer)
    packing = _packing(options, samples) if options.packed else None
    name = str(options.tokenizer or SHIPPED_MODEL.name)
    notes = [
        f"{len(samples)} {origin}, seed {options.seed}"
        + (f", task {options.task}" if options.task else ""),
        f"tokens of {name}: {tokenizer.vocab_size:,} in the vocabulary, {tokenizer.slots} slots a "
        f"picture; mask of dialogues: {options.mask}",
    ]
    page = sample_page(f"Samples of {options.source}", notes, samples, tokenizer, packing)
    options.output.write_text(page, encoding="utf-8")
    size = options.output.stat().st_size
    print(f"wrote {counted(len(samples), 'sample')} to {options.output} ({size / 1e6:.1f} MB)")
    return SUCCESS


def _row_samples(options: InspectOptions, tokenizer: "Tokenizer") -> "tuple[list[Shown], str]":
    """Returns samples drawn from the source, unusable rows among them, and of how many, in words.

    Raises: ConfigError where no row that was looked at has the wanted task.
    """
    from qwenvl_jax.data.example import DataError
    from qwenvl_jax.data.sources.open import open_source
    from qwenvl_jax.data.tasks import example_of

    if options.source in NAMES:
        source = open_generated(options.source, _GENERATED_ROWS, options.generated)
    else:
        source = open_source(options.source, options.pictures)
    looks = min(len(source), options.num if options.task is None else _MAX_LOOKS)
    samples: list[Shown] = []
    tasks: set[str] = set()
    for index in random.Random(options.seed).sample(range(len(source)), looks):
        if len(samples) == options.num:
            break
        try:
            record = source[index]
            tasks.add(record.task)
            if options.task in (None, record.task):
                samples.append(example_of(record, tokenizer, options.mask))
        except DataError as error:
            if options.task is None:
                samples.append(error)
    if not samples:
        raise ConfigError(
            f"no row of task {options.task!r} among {looks} that were looked at: got tasks "
            f"{', '.join(sorted(tasks)) or 'none that can be used'}"
        )
    return samples, f"of {counted(len(source), 'row')}"


def _scene_samples(options: InspectOptions, tokenizer: "Tokenizer") -> "Iterator[Shown]":
    from qwenvl_jax.data.sources.scene_rows import TASKS, scene_example

    if options.task is not None and options.task not in TASKS:
        raise ConfigError(f"unknown task of the scenes: got {options.task!r}, expected {TASKS}")
    rng = random.Random(options.seed)
    for i in range(options.num):
        task = options.task or TASKS[i % len(TASKS)]
        yield scene_example(task, rng.getrandbits(48), "train", _SCENE_SIDE, tokenizer)


def _packing(options: InspectOptions, samples: "Sequence[Shown]") -> "Packing":
    """Returns rows of those samples that fit, as training plans them."""
    from qwenvl_jax.data.example import Example
    from qwenvl_jax.data.row_sizes import planned_rows
    from qwenvl_jax.data.sample_page import Packing

    sizes = {
        i: (len(sample.ids), len(sample.images))
        for i, sample in enumerate(samples)
        if isinstance(sample, Example)
        and 0 < len(sample.ids) <= options.length
        and len(sample.images) <= options.max_images
    }
    places, tokens = list(sizes), [size[0] for size in sizes.values()]
    pictures = [size[1] for size in sizes.values()]
    rows = planned_rows(tokens, pictures, options.length, options.max_images)
    return Packing(
        [[places[number] for number in row] for row in rows], options.length, options.max_images
    )


if __name__ == "__main__":
    leave(main())
