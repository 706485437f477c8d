"""Shows a model at work on pictures it has never seen, and writes one picture of it.

Scenes are drawn from the held-out stream. For each, the model describes it, answers a question and
finds a thing (or reads a word). Then it compares two collages of shapes, and finds something
asked for in Chinese. The sheet holds every picture with its boxes, prompts and answers.

Examples:
    qwenvl demo
    qwenvl demo --seed 7 --scenes 5 --output sheet.png
"""

import dataclasses
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_jax.cli.errors import SUCCESS, leave, run_command
from qwenvl_jax.cli.opening import AnswerOptions, open_model, waiting
from qwenvl_jax.cli.options import check_positive, parse_options
from qwenvl_jax.cli.outputs import check_output, save_picture
from qwenvl_jax.config import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from qwenvl_jax.data.sources.scenes import Scene
    from qwenvl_jax.evaluation.rows import RowPaper
    from qwenvl_jax.evaluation.scenes import Paper
    from qwenvl_jax.evaluation.sheet import Exchange
    from qwenvl_jax.inference.vl import VL


NUM_COLLAGES = 2**31
COLLAGES_A_SEED = 97
MAX_SEED = NUM_COLLAGES // COLLAGES_A_SEED // 2  # there are collages to look at for each


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
    check_positive(options, "scenes")
    if not 0 <= options.seed <= MAX_SEED:
        raise ConfigError(f"--seed must lie in 0 .. {MAX_SEED}: got {options.seed}")
    check_output(options.output)

    import numpy as np
    from PIL import Image

    from qwenvl_jax.evaluation.rows import row_marks
    from qwenvl_jax.evaluation.scenes import is_right
    from qwenvl_jax.evaluation.sheet import Sitting, draw_sheet

    vl = open_model(AnswerOptions(model=options.model))
    options.pictures.mkdir(parents=True, exist_ok=True)
    side, sittings = vl.config.image_size, []
    for number, scene in enumerate(draw_scenes(options, side), start=1):
        path = options.pictures / f"scene_{number}.png"
        Image.fromarray(scene.image).save(path)
        exchanges = []
        for paper in papers_of(scene, vl):
            answer = _ask(vl, options.model, paper.asked, {path: scene.image})
            exchanges.append(_told(paper.asked, answer, is_right(paper, answer), expected(paper)))
        sittings.append(Sitting(scene.image, exchanges))
    for number, paper in enumerate(collages(options, vl), start=1):
        shown = {
            options.pictures / f"collage_{number}_{i}.png": image
            for i, image in enumerate(paper.images_IYXC, start=1)
        }
        for path, image in shown.items():
            Image.fromarray(image).save(path)
        asked = question_of(paper)
        answer = _ask(vl, options.model, asked, shown)
        right = all(mark.value == 1.0 for mark in row_marks(paper, answer))
        exchange = _told(asked, answer, right, paper.expected)
        sittings.append(Sitting(np.concatenate(paper.images_IYXC, axis=1), [exchange]))
    title = "Pictures the model never saw. Green: right. Red: wrong."
    save_picture(draw_sheet(title, sittings), options.output)
    print(f"\nwrote {options.output}; the pictures alone are in {options.pictures}")
    return SUCCESS


def _ask(vl: "VL", model: Path | None, asked: str, images: "Mapping[Path, np.ndarray]") -> str:
    """Returns the answer, after printing the command that gives it again."""
    words = [] if model is None else ["--model", shlex.quote(str(model))]
    words += [f"--image {shlex.quote(str(path))}" for path in images]
    print(f'\npython infer.py {" ".join(words)} --temperature 0 "{asked}"')
    with waiting("answering"):
        reply = vl.chat(asked, images=[*images.values()], temperature=0.0, max_new_tokens=96)
    return reply.text


def _told(asked: str, answer: str, right: bool, expected: str) -> "Exchange":
    from qwenvl_jax.evaluation.sheet import Exchange

    print(f"  {answer.strip()}   ({'right' if right else 'wrong'})", flush=True)
    return Exchange(asked, answer, right, expected)


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


def collages(options: DemoOptions, vl: "VL") -> "Iterator[RowPaper]":
    """Yields the first question of the seed about two pictures, and the first place in Chinese."""
    from qwenvl_jax.data.sources.collages import Collages
    from qwenvl_jax.evaluation.rows import row_paper

    side = vl.config.image_size
    for language, task, form in (("en", "compare", "text"), ("zh", "chat", "place")):
        rows = Collages(
            NUM_COLLAGES,
            "heldout",
            side=max(side, 64),
            languages=(language,),
            tasks=(task,),
            most_kinds=2,
        )
        first = options.seed * COLLAGES_A_SEED
        papers = (row_paper(rows[i], vl.tokenizer, side) for i in itertools.count(first))
        yield next(paper for paper in papers if paper is not None and paper.form == form)


def question_of(paper: "RowPaper") -> str:
    """Returns the question alone, as a person would type it: behind the last picture's line."""
    start, end = "</img>\n", "<|im_end|>"
    return paper.asked.rpartition(start)[2].partition(end)[0]


if __name__ == "__main__":
    leave(main())
