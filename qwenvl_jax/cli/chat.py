"""Talks about pictures over several turns, in the terminal or from a pipe.

    /image PATH   show a picture with the next message        /history   what was said
    /clear        start again                                 /quit      end (or Ctrl-D)

Examples:
    qwenvl chat
    printf '/image street.jpg\\nWhat is this?\\n' | qwenvl chat --model Qwen-VL-Chat
"""

import dataclasses
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qwenvl_jax.cli.errors import (
    SUCCESS,
    USAGE_ERROR,
    is_user_error,
    leave,
    note_cut_work,
    one_line,
    run_command,
)
from qwenvl_jax.cli.opening import AnswerOptions, check_text, open_model
from qwenvl_jax.cli.options import parse_options
from qwenvl_jax.cli.outputs import check_folder, first_free, numbered, save_drawn
from qwenvl_jax.config import ConfigError
from qwenvl_jax.words import counted

if TYPE_CHECKING:
    import numpy as np

    from qwenvl_jax.inference.session import Reply, Turn
    from qwenvl_jax.inference.vl import VL

HELP = "commands: /image PATH, /history, /clear, /quit; anything else is said to the model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TalkOptions(AnswerOptions):
    system: str | None = None
    """What the model is told about its role; the released model's words if left out."""
    output_dir: Path = Path()
    """Where pictures with boxes go, as the first of answer-1.png and so on that is free."""

    def check(self) -> None:
        """Raises ConfigError for options that cannot be served."""
        super().check()
        if self.system is not None:
            check_text(self.system, "--system", sys.getfilesystemencoding(), "LC_ALL")

    def choice(self) -> dict:
        given = super().choice()
        return given if self.system is None else given | {"system": self.system}


class Talk:
    """One dialogue at a terminal: the history, and the pictures that wait for the next message."""

    def __init__(self, vl: "VL", options: TalkOptions):
        self._vl, self._options = vl, options
        self._history: tuple[Turn, ...] = ()
        self._waiting: list[np.ndarray] = []
        self._latest: np.ndarray | None = None  # the picture that boxes refer to, in full size

    def take(self, line: str) -> bool:
        """Does what one line says; returns False when it says to end."""
        word, _, rest = line.strip().partition(" ")
        if word == "/quit":
            return False
        if word == "/image" and not rest.strip():
            raise ConfigError("/image needs the path of a picture: /image street.jpg")
        if word == "/image":
            self._add_picture(rest.strip())
        elif word == "/clear":
            self._history, self._waiting, self._latest = (), [], None
        elif word == "/history":
            self._show_history()
        elif word == "/help":
            print(HELP)
        elif word.startswith("/"):
            raise ConfigError(f"no such command: got {word!r}, expected one of these {HELP}")
        elif word:
            self._say(line.strip())
        return True

    def _add_picture(self, path: str) -> None:
        from qwenvl_jax.image import load_image

        image_YXC = load_image(path)
        self._waiting.append(image_YXC)
        height, width = image_YXC.shape[:2]
        print(f"{path}: {width} x {height}, goes with the next message")

    def _show_history(self) -> None:
        for turn in self._history:
            pictures = f"[{counted(len(turn.images), 'picture')}] " if turn.images else ""
            print(f"> {pictures}{turn.text}\n{turn.answer}")

    def _say(self, text: str) -> None:
        try:
            stream = self._vl.chat_stream(
                text, self._waiting, self._history, live_tags=True, **self._options.choice()
            )
        except ValueError:
            if self._waiting:  # or they would make the next message too long as well
                dropped = counted(len(self._waiting), "picture")
                print(f"({dropped} no longer waiting)", file=sys.stderr)
                self._waiting = []
            raise
        try:
            for piece in stream:
                print(piece, end="", flush=True)
        finally:
            print()
        reply = stream.reply
        if self._waiting:
            self._latest = self._waiting[-1]
        self._history, self._waiting = reply.history, []
        self._report(reply)

    def _report(self, reply: "Reply") -> None:
        if reply.dropped_turns:
            left = counted(reply.dropped_turns, "oldest turn")
            print(
                f"({left} left out: the dialogue is too long)",
                file=sys.stderr,
            )
        if not reply.is_complete:
            print(f"(cut after {counted(len(reply.tokens), 'token')})", file=sys.stderr)
        elif not reply.text.strip():
            print("(the answer is empty)", file=sys.stderr)
        if reply.boxes and self._latest is not None:
            path = first_free(self._options.output_dir, numbered(1))
            save_drawn(self._latest, reply.boxes, path)
            print(f"(boxes: {path})", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code of the command."""
    return run_command("chat", _run, argv)


def _run(argv: Sequence[str]) -> int:
    options = parse_options(TalkOptions, argv, "qwenvl chat", __doc__)
    options.check()
    if options.output_dir != Path():  # else nobody has asked for pictures
        check_folder(options.output_dir)
    talk = Talk(open_model(options), options)
    is_terminal = sys.stdin.isatty()
    encoding = sys.stdin.encoding or "utf-8"  # what is no file may have none
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `check_text` names the line instead
    if is_terminal:
        print(HELP)
    has_failed = False
    for number, line in enumerate(_lines(is_terminal), start=1):
        try:
            check_text(line, f"line {number}", encoding, "PYTHONIOENCODING")
            if not talk.take(line):
                break
        except KeyboardInterrupt:
            note_cut_work()
            print("(stopped)", file=sys.stderr)  # the answer; the dialogue goes on
        except Exception as error:
            if isinstance(error, BrokenPipeError) or not is_user_error(error):
                raise
            has_failed = True
            print(f"chat: {one_line(error)}", file=sys.stderr)
    # A person saw the message and went on; a script needs to hear of it.
    return USAGE_ERROR if has_failed and not is_terminal else SUCCESS


def _lines(is_terminal: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return


if __name__ == "__main__":
    leave(main())
