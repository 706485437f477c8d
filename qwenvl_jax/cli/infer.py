"""Answers one prompt about pictures, and draws the boxes of the answer.

Examples:
    python infer.py --image street.jpg "What is parked on the left?"
    python infer.py --image street.jpg --task locate "the red car" --output car.png
    python infer.py --image a.jpg --image b.jpg --model Qwen-VL-Chat "What differs?"
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from qwenvl_jax.cli.errors import SUCCESS, leave, one_line, run_command
from qwenvl_jax.cli.opening import AnswerOptions, check_text, open_model, waiting
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.cli.outputs import check_output, first_free, numbered, save_drawn
from qwenvl_jax.config import ConfigError
from qwenvl_jax.words import counted

if TYPE_CHECKING:
    import numpy as np

    from qwenvl_jax.inference.session import Reply
    from qwenvl_jax.inference.vl import VL

Task = Literal["chat", "complete", "caption", "ground", "question", "locate", "read"]
PROMPTLESS = ("caption", "ground", "read")
PICTURED = (*PROMPTLESS, "question", "locate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferOptions(AnswerOptions):
    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PROMPT]")] = ""
    """What to ask; ref, box and quad tags in it are tags."""
    image: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A picture, or several by repeating the option; in the order of reading."""
    task: Task = "chat"
    """chat: one turn of a dialogue. The others are the base model's formats: complete (the prompt
    goes on), caption, ground (a caption with boxes), question, locate (a phrase), read (words)."""
    raw_prompt: bool = False
    """The prompt is trusted and whole: all tags are live, <img></img> is where a picture goes."""
    output: Path | None = None
    """Where to draw the boxes of the answer, on the last picture; here as answer.png, or the first
    of answer-2.png and so on that is free."""
    allow_fetch: bool = False
    """Pictures may be http addresses."""

    @property
    def is_greedy(self) -> bool:
        is_dialogue = self.task == "chat" and not self.raw_prompt
        return super().is_greedy or (self.temperature is None and not is_dialogue)

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other."""
        super().check()
        check_text(self.prompt, "the prompt", sys.getfilesystemencoding(), "LC_ALL")
        if self.raw_prompt and self.task != "chat":
            raise ConfigError(f"--raw-prompt has no --task: got {self.task!r}; leave one of them")
        if self.task in PROMPTLESS and self.prompt:
            raise ConfigError(f"--task {self.task} takes no prompt: got {self.prompt!r}")
        if self.task not in PROMPTLESS and not self.prompt.strip():
            raise ConfigError('the prompt is missing: say what to ask, infer.py "What is it?"')
        if self.task in PICTURED and not self.image:
            raise ConfigError(
                f"--task {self.task} needs a picture: got none; name one with --image PATH"
            )
        if self.output is not None and not self.image:
            raise ConfigError("--output needs a picture to draw on: give --image")
        if self.output is not None:
            check_output(self.output, self.image)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("infer", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(InferOptions, argv, "python infer.py", __doc__)
    # What can be wrong cheaply is found before the model is loaded.
    from qwenvl_jax.image import load_image

    options.check()
    images = [load_image(source, allow_fetch=options.allow_fetch) for source in options.image]
    vl = open_model(options)
    with waiting("answering"):
        reply = _answer(vl, options, images)
    print(reply.text.strip())
    if not reply.is_complete:
        count = counted(len(reply.tokens), "token")
        print(f"cut after {count}; --max-new-tokens allows more", file=sys.stderr)
    elif not reply.text.strip():
        print("the answer is empty", file=sys.stderr)
    if reply.boxes and images:
        _draw(images[-1], reply, options.output)
    elif options.output is not None:
        print(f"the answer has no boxes: {options.output} is not written", file=sys.stderr)
    return SUCCESS


def _draw(image_YXC: "np.ndarray", reply: "Reply", output: Path | None) -> None:
    path = output or first_free(Path(), itertools.chain(["answer.png"], numbered(2)))
    try:
        save_drawn(image_YXC, reply.boxes, path)
    except OSError as error:
        if output is not None:
            raise
        # nobody asked for this file, and the answer is there
        print(f"boxes are not drawn: {one_line(error)}; name a place by --output", file=sys.stderr)
    else:
        print(f"boxes: {path}", file=sys.stderr)


def _answer(vl: "VL", options: InferOptions, images: Sequence) -> "Reply":
    if options.raw_prompt:
        return vl.complete(options.prompt, images, raw=True, **options.choice())
    if options.task == "chat":
        return vl.chat(options.prompt, images, live_tags=True, **options.choice())
    text = task_prompt(options.task, options.prompt)
    return vl.complete(text, images, live_tags=True, **options.choice())


def task_prompt(task: Task, prompt: str) -> str:
    """Returns the text that follows the pictures, in the words the base model was trained with.

    >>> task_prompt("question", "What is it?")
    ' What is it? Answer:'
    """
    from qwenvl_jax.data import tasks

    if task == "complete":
        return prompt
    segments = {
        "caption": lambda: tasks.caption("", picture=""),
        "ground": lambda: tasks.grounded_caption((), picture=""),
        "question": lambda: tasks.vqa(prompt, "", picture=""),
        "locate": lambda: tasks.ref_grounding(prompt, (), picture=""),
        "read": lambda: tasks.ocr((), picture=""),
    }[task]()
    return segments[0].text


if __name__ == "__main__":
    leave(main())
