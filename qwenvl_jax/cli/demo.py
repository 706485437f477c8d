"""Shows a model at work on pictures it has never seen, and writes one picture of it.

Scenes are drawn from the held-out stream. For each, the model describes it, answers a question and
finds a thing (or reads a word); the sheet holds every picture with its boxes, prompts and answers.

Examples:
    qwenvl demo
    qwenvl demo --seed 7 --scenes 5 --output sheet.png
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_jax.cli.errors import SUCCESS, run_command
from qwenvl_jax.cli.opening import AnswerOptions, check_output, open_model, waiting
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.config import ConfigError

if TYPE_CHECKING:
    from qwenvl_jax.data.sources.scenes import Scene
    from qwenvl_jax.evaluation.scenes import Paper
    from qwenvl_jax.inference.vl import VL


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    model: Path | None = None
    """A folder with a model that was trained on scenes; the shipped model if left out."""
    scenes: int = 3
    """Pictures to draw; every third one has something written in it."""
    seed: int = 0
    """Which pictures; the same seed draws the same ones."""
    output: Path = Path("demo.png")
    """Where the sheet goes."""
    pictures: Path = Path("build/demo")
    """Where each picture goes, without boxes, to try other prompts on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("demo", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(DemoOptions, argv, "qwenvl demo", __doc__)
    if options.scenes <= 0:
        raise ConfigError(f"--scenes must be positive: got {options.scenes}")
    check_output(options.output)

    from PIL import Image

    from qwenvl_jax.evaluation.scenes import is_right
    from qwenvl_jax.evaluation.sheet import Exchange, Sitting, draw_sheet

    vl = open_model(AnswerOptions(model=options.model))
    options.pictures.mkdir(parents=True, exist_ok=True)
    sittings = []
    for number, scene in enumerate(draw_scenes(options, vl.config.image_size), start=1):
        path = options.pictures / f"scene_{number}.png"
        Image.fromarray(scene.image).save(path)
        exchanges = []
        for paper in papers_of(scene, vl):
            print(f'\npython infer.py --image {path} "{paper.asked}"')
            with waiting("answering"):
                reply = vl.chat(
                    paper.asked, images=[scene.image], temperature=0.0, max_new_tokens=96
                )
            right = is_right(paper, reply.text)
            print(f"  {reply.text.strip()}   ({'right' if right else 'wrong'})", flush=True)
            exchanges.append(Exchange(paper.asked, reply.text, right, expected(paper)))
        sittings.append(Sitting(scene.image, exchanges))
    title = "Pictures the model never saw. Green: right. Red: wrong."
    draw_sheet(title, sittings).save(options.output)
    print(f"\nwrote {options.output}; the pictures alone are in {options.pictures}")
    return SUCCESS


def draw_scenes(options: DemoOptions, side: int) -> "Iterator[Scene]":
    """Yields the first scenes of the seed that hold two shapes or more, or writing and a shape."""
    from qwenvl_jax.data.sources.scenes import scene

    keys = itertools.count(options.seed * 1_000_003)
    for number in range(1, options.scenes + 1):
        has_writing = number % 3 == 0
        drawn = (scene(key, "heldout", side, has_writing=has_writing) for key in keys)
        yield next(one for one in drawn if len(one.things) >= (1 if has_writing else 2))


def papers_of(scene: "Scene", vl: "VL") -> "list[Paper]":
    """Returns what the model is asked about a scene, in chat form."""
    from qwenvl_jax.evaluation.scenes import set_paper

    last = "read" if scene.writing is not None else "question"
    return [
        set_paper(subject, "chat", scene, vl.tokenizer) for subject in ("caption", last, "locate")
    ]


def expected(paper: "Paper") -> str:
    """Returns a right answer, as the model would write it."""
    from qwenvl_jax.prompt.boxes import format_box

    return paper.expected[0] if paper.box is None else format_box(paper.box)


if __name__ == "__main__":
    sys.exit(main())
