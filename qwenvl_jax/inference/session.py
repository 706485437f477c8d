"""Text in, text out: dialogues with pictures, and completions in the base model's formats.

A dialogue is a tuple of turns that the caller holds; nothing is kept here, so any turn can be
asked again, and one model serves any number of dialogues. Pictures stay in the turns as pixels;
their features are cached by content (`pictures.py`), so a later turn does not run the tower again.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from qwenvl_jax.image import load_image, to_square
from qwenvl_jax.image.load import ImageSource
from qwenvl_jax.inference.errors import InputError, RequestOptions
from qwenvl_jax.inference.sampling import GREEDY, Sampling
from qwenvl_jax.prompt.boxes import parse_boxes
from qwenvl_jax.prompt.chat import (
    DEFAULT_SYSTEM,
    PLACE_TAGS,
    RELEASED_WINDOW,
    Message,
    Picture,
    Rendered,
    render_prompt,
)
from qwenvl_jax.words import did_you_mean

if TYPE_CHECKING:
    from qwenvl_jax.inference.vl import VL

RELEASED_ANSWER = 512  # new tokens, unless the context is small

# A prompt that ends in a phrase, with or without an opened box, lends it to the answer's boxes.
_OPEN_PHRASE = re.compile(r"<ref>[^<]*</ref>(?:<box>|<quad>)?\Z")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions(RequestOptions):
    """How a text is answered; the defaults are greedy."""

    max_new_tokens: int | None = None  # None: 512, or half of a context shorter than 1024
    temperature: float = GREEDY
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    live_tags: bool = False  # `<ref>`, `<box>`, `<quad>` in the text are tags, not text
    every: int = 4  # tokens between two pieces of a stream

    def sampling(self) -> Sampling:
        names = [field.name for field in dataclasses.fields(Sampling)]
        return Sampling(**{name: getattr(self, name) for name in names})

    @property
    def live(self) -> tuple[str, ...]:
        return PLACE_TAGS if self.live_tags else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatOptions(TextOptions):
    """The same for a dialogue. Source: `generation_config.json` of the released chat model."""

    temperature: float = 1.0
    top_p: float = 0.3
    system: str = DEFAULT_SYSTEM
    max_window: int = RELEASED_WINDOW  # ids of system and history; older turns are dropped


Options = TypeVar("Options", bound=TextOptions)


def make_options(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Returns the options of a call.

    Raises:
        TypeError: one does not exist; the nearest and all others are named.
        InputError: one is of another type.
    """
    names = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in names:
            expected = ", ".join(names) + did_you_mean(name, names)
            raise TypeError(f"no such option: got {name!r}, expected {expected}")
    return kind(**given)


class Turn(NamedTuple):
    """A question, its pictures as uint8 [Y, X, 3] squares, and what was answered."""

    text: str
    images: tuple[np.ndarray, ...]
    answer: str
    live: tuple[str, ...] = ()  # tags that the question meant as tags


History = Sequence[Turn | tuple[str, str]]  # plain pairs are a question and its answer
Pictures = ImageSource | Sequence[ImageSource] | None  # one picture, or several


class Reply(NamedTuple):
    text: str  # with ref, box and quad tags, without other special tokens
    boxes: list[dict[str, Any]]  # see `parse_boxes`; coordinates 0..999 of the last picture
    history: tuple[Turn, ...]  # to pass with the next question; a completion has none
    tokens: list[int]
    is_complete: bool  # the model ended the answer itself; False: it was cut at max_new_tokens
    dropped_turns: int = 0  # oldest turns that did not fit the window


class TextStream:
    """Iterates once over the pieces of an answer's text as they come; `.reply` is the whole.

    A loop that was left goes on with the next piece.
    """

    def __init__(
        self,
        vl: "VL",
        prompt: Rendered,
        options: TextOptions,
        stop_tokens: Sequence[int],
        finish: Callable[[str, list[int], bool], Reply],
    ):
        self._decoder = vl.tokenizer.stream(skip_special=True, keep=PLACE_TAGS)
        self._max_new_tokens = max_new_tokens(vl, options)
        self._finish = finish
        self._reply: Reply | None = None
        self._tokens = vl.stream(
            prompt.ids,
            prompt.images,
            max_new_tokens=self._max_new_tokens,
            stop_tokens=stop_tokens,
            every=options.every,
            **dataclasses.asdict(options.sampling()),
        )
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self) -> Iterator[str]:
        tokens: list[int] = []
        pieces: list[str] = []
        for new in self._tokens:
            tokens += new
            pieces.append(self._decoder.push(new))
            if pieces[-1]:
                yield pieces[-1]
        pieces.append(self._decoder.finish())
        if pieces[-1]:
            yield pieces[-1]
        is_complete = len(tokens) < self._max_new_tokens
        self._reply = self._finish("".join(pieces), tokens, is_complete)

    @property
    def reply(self) -> Reply:
        """The whole answer; runs what is left of it first.

        Raises: RuntimeError where an error or an interrupt has ended the stream before.
        """
        for _ in self:
            pass
        if self._reply is None:
            raise RuntimeError("the answer is not whole: its stream was interrupted; ask again")
        return self._reply


def chat_stream(
    vl: "VL",
    text: str,
    images: Pictures,
    history: History,
    options: ChatOptions,
) -> TextStream:
    """Returns the stream of the answer to one message of a dialogue.

    Pictures are numbered through the dialogue, `Picture 1:` first. The history that was given is
    not changed.

    Raises:
        ImageError: a picture that cannot be read.
        InputError: the text is no `str`, or a turn of the history is neither a `Turn` nor a
            question and its answer.
        ChatError: the message alone exceeds the context.
    """
    tok = vl.tokenizer
    _check_text(text)
    squares = _load_squares(vl, images)
    turns = [_as_turn(turn, number) for number, turn in enumerate(history, start=1)]
    turns = [turn._replace(images=_load_squares(vl, turn.images)) for turn in turns]
    messages = [Message("system", options.system)]
    for turn in turns:
        messages.append(_question(turn.text, turn.images, turn.live))
        messages.append(Message("assistant", turn.answer, PLACE_TAGS))
    messages.append(_question(text, squares, options.live))
    room = vl.config.decoder.max_positions - max_new_tokens(vl, options)
    prompt = render_prompt(tok, messages, options.max_window, max_length=room)

    def finish(answer: str, tokens: list[int], is_complete: bool) -> Reply:
        turn = Turn(text, squares, answer, options.live)
        boxes = parse_boxes(answer, inherit_ref=True)
        return Reply(answer, boxes, (*turns, turn), tokens, is_complete, prompt.dropped_turns)

    stop_tokens = (tok.im_end_id, tok.im_start_id, tok.endoftext_id)
    return TextStream(vl, prompt, options, stop_tokens, finish)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise InputError(f"the text must be a str: got {text!r:.80}")


def _as_turn(turn: Any, number: int) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(t, str) for t in turn):
        return Turn(turn[0], (), turn[1])
    raise InputError(
        f"turn {number} of the history is {turn!r:.80}: expected a Turn, or a pair of two texts, "
        "question and answer; pass `reply.history` on, or such pairs"
    )


def complete_stream(
    vl: "VL", text: str, images: Pictures, options: TextOptions, *, raw: bool = False
) -> TextStream:
    """Returns the stream of what follows the pictures and the text, up to the end of the text.

    The base model's formats are prompts of this kind: pictures, then `Generate the caption in
    English:` and the like, without roles. `raw`: the text is trusted, all tags in it are live, and
    its `<img></img>` marks say where the pictures go.

    Raises:
        ImageError: a picture that cannot be read.
        InputError: the prompt is too long, or `raw` text marks more or fewer pictures than given.
    """
    tok = vl.tokenizer
    _check_text(text)
    squares = _load_squares(vl, images)
    if raw:
        ids = tok.encode_raw(text)
    else:
        ids = tok.image_ids() * len(squares) + tok.encode(text, options.live)
    if not ids:
        raise InputError("the prompt is empty: give a text, a picture or both")

    def finish(answer: str, tokens: list[int], is_complete: bool) -> Reply:
        phrase = _OPEN_PHRASE.search(text)
        boxes = parse_boxes((phrase.group() if phrase else "") + answer, inherit_ref=True)
        return Reply(answer, boxes, (), tokens, is_complete)

    prompt = Rendered(ids, [False] * len(ids), list(squares))
    return TextStream(vl, prompt, options, (tok.endoftext_id,), finish)


def max_new_tokens(vl: "VL", options: TextOptions) -> int:
    """Returns the asked or the default length of an answer.

    Raises:
        InputError: it leaves no room for a prompt.
    """
    context = vl.config.decoder.max_positions
    if options.max_new_tokens is None:
        return min(RELEASED_ANSWER, context // 2)
    if not 0 <= options.max_new_tokens < context:
        raise InputError(
            f"max_new_tokens must lie in 0 .. {context - 1}, within the model's context: "
            f"got {options.max_new_tokens}"
        )
    return options.max_new_tokens


def _question(text: str, images: Sequence[np.ndarray], live: Sequence[str]) -> Message:
    return Message("user", [*map(Picture, images), text], live)


def _load_squares(vl: "VL", images: Pictures) -> tuple[np.ndarray, ...]:
    """Returns the pictures at the model's size; those of a history have it, but for another's."""
    side = vl.config.image_size

    def square(image: Any) -> np.ndarray:
        is_ready = isinstance(image, np.ndarray) and image.shape == (side, side, 3)
        return image if is_ready and image.dtype == np.uint8 else to_square(load_image(image), side)

    return tuple(square(image) for image in _several(images))


def _several(images: Any) -> list[Any]:
    """Returns the pictures, also where one comes without a list; a 4-D array holds several."""
    one = (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)
    if isinstance(images, one) or (isinstance(images, np.ndarray) and images.ndim < 4):
        return [images]
    return [] if images is None else list(images)
