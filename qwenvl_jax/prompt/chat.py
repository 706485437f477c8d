"""ChatML: messages to ids, for answering and for fine-tuning alike.

A message is one block, `<|im_start|>role\\ncontent<|im_end|>`, and a newline follows each block. A
prompt ends with `<|im_start|>assistant\\n`. Content is text, pictures and places; special tokens
come from that structure, and from tags in the text only where a message's `live` names them.
Each picture reads `Picture k: <img>...</img>\\n`, k counting from 1 through the whole dialogue.
Source: released `make_context` and `finetune.py`; paper B.2.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsFloat, get_args

from qwenvl_jax.config import LossMask
from qwenvl_jax.prompt.boxes import box_text, quad_text

if TYPE_CHECKING:
    from qwenvl_jax.prompt.tokenizer import Tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."
RELEASED_WINDOW = 6144  # ids of system and history together
PLACE_TAGS = ("ref", "box", "quad")  # what a caller may make live in user text
RELEASED_CHAT_TAGS = (*PLACE_TAGS, "img")  # what the released chat() makes live

_ROLES = ("system", "user", "assistant")


class ChatError(ValueError):
    """A dialogue that cannot be written as ChatML: what is wrong, got, expected."""


class Picture(NamedTuple):
    """A picture's place in a message. `source` is whatever the caller loads; never read here."""

    source: Any


class Region(NamedTuple):
    """A phrase, places, or a phrase and its places, in 0..999 coordinates."""

    ref: str | None = None
    boxes: Iterable[Iterable[SupportsFloat]] = ()
    quads: Iterable[Iterable[Iterable[SupportsFloat]]] = ()


Part = str | Picture | Region
Turn = Sequence[str | None]  # (user, assistant), or (user, None) where the answer is awaited


class Message(NamedTuple):
    """One turn. `live` names the tags ("ref", "box", "quad", "img") that its text may hold.

    "img" is for trusted text only: what stands inside the tags becomes the picture's source.
    """

    role: str
    content: str | Sequence[Part]
    live: Sequence[str] = ()


class Rendered(NamedTuple):
    """A dialogue as ids. `images` are the sources in the order of their spans in `ids`."""

    ids: list[int]
    is_target: list[bool]  # this token is learnt (unshifted); all False in a prompt
    images: list[Any]
    dropped_turns: int = 0  # oldest turns that did not fit, with their pictures


class _Block(NamedTuple):
    """One message's ids, the newline after it included. `content` is where its text lies."""

    role: str
    ids: list[int]
    content: slice
    images: list[Any]


# --- prompts ------------------------------------------------------------------------------------


def messages_from_turns(turns: Sequence[Turn], system: str, live: Sequence[str]) -> list[Message]:
    """Returns messages of `[(user, assistant), ..., (user, None)]`.

    Raises: ChatError where the last turn is answered or another is not.
    """
    messages = [Message("system", system, live)]
    for i, (user, answer) in enumerate(turns):
        if user is None or (answer is None) != (i == len(turns) - 1):
            raise ChatError(
                "a prompt needs turns (user, assistant), ..., (user, None), only the last without "
                f"an answer: got {(user and user[:40], answer and answer[:40])} as turn {i + 1} of "
                f"{len(turns)}"
            )
        messages.append(Message("user", user, live))
        if answer is not None:
            messages.append(Message("assistant", answer, live))
    if len(messages) == 1:
        raise ChatError("a prompt needs at least one turn: got none, expected [(user, None)]")
    return messages


def render_prompt(
    tok: "Tokenizer",
    messages: Sequence[Message],
    max_window: int = RELEASED_WINDOW,
    max_length: int | None = None,
) -> Rendered:
    """Returns the prompt that awaits an answer to the last message.

    Messages are an optional system first (the released text is put there where none is), then user
    and assistant in turn, the last from the user. A turn is a question with its answer; the oldest
    whole turns are dropped until system and history are shorter than `max_window` ids. The last
    question is never dropped nor counted, as released. `max_length` counts everything and drops
    further turns for it: give it the context less the answer's length.
    `dropped_turns` says how many went, so that a caller can tell; picture numbers stay as they
    were, and `images` are those that are left.

    Raises: ChatError for a wrong order of roles, and where the last question alone exceeds
    `max_length`.
    Source: released `make_context`. Differs: reports what it drops; `max_length`.
    """
    if not messages or messages[0].role != "system":
        messages = [Message("system", DEFAULT_SYSTEM), *messages]
    roles = [message.role for message in messages]
    if len(roles) % 2 or roles[1:] != (["user", "assistant"] * len(roles))[: len(roles) - 1]:
        raise ChatError(
            f"a prompt needs an optional system, then user and assistant in turn, ending with user:"
            f" got {roles}"
        )
    system, *rest = _blocks(tok, messages)
    opening = _opening(tok, "assistant")
    turns = [rest[i : i + 2] for i in range(0, len(rest) - 1, 2)]
    sizes = [sum(len(block.ids) for block in turn) for turn in turns]

    # The released code counts each newline before its block, so the system block has none.
    history = len(system.ids) - 1
    fixed = len(system.ids) + len(rest[-1].ids) + len(opening)
    if max_length is not None and fixed > max_length:
        raise ChatError(
            f"the prompt is too long: the last message with its system text takes {fixed} ids, "
            f"{max_length} are left beside the answer; shorten it, send fewer pictures "
            f"({tok.slots + 2} ids each), or lower max_new_tokens"
        )
    kept = 0
    for size in reversed(sizes):
        history, fixed = history + size, fixed + size
        if history >= max_window or (max_length is not None and fixed > max_length):
            break
        kept += 1

    dropped = len(turns) - kept
    blocks = [system, *(block for turn in turns[dropped:] for block in turn), rest[-1]]
    ids = [token for block in blocks for token in block.ids] + opening
    images = [source for block in blocks for source in block.images]
    return Rendered(ids, [False] * len(ids), images, dropped)


# --- fine-tuning --------------------------------------------------------------------------------


def messages_from_conversations(
    conversations: Sequence[Mapping[str, str]], system: str = DEFAULT_SYSTEM
) -> list[Message]:
    """Returns messages of one fine-tuning row: `[{"from": "user", "value": ...}, ...]`.

    Picture and box tags in the values are live. A first turn that is not the user's is dropped.

    Raises: ChatError for a turn of another form, where none is left, and where the dropped one
        shows a picture: then user and assistant are swapped.
    Source: released `finetune.py`. Differs: ChatML markers inside a value stay text; there a
    picture of the dropped turn is lost silently.
    """
    for i, turn in enumerate(conversations):
        if turn.get("from") not in ("user", "assistant") or not isinstance(turn.get("value"), str):
            raise ChatError(
                f'conversation turn {i} must be {{"from": "user" or "assistant", "value": text}}: '
                f"got {dict(turn)!r:.120}"
            )
    messages = [Message(turn["from"], turn["value"], RELEASED_CHAT_TAGS) for turn in conversations]
    if messages and messages[0].role == "assistant":
        first, *messages = messages
        if "<img>" in first.content:
            raise ChatError(
                "the conversation starts with an answer, and that shows a picture: got "
                f"{first.content[:60]!r}, expected a question first; are user and assistant "
                "swapped?"
            )
    if not messages:
        raise ChatError("the conversation has no turn of the user: nothing to learn from")
    return [Message("system", system), *messages]


def render_example(
    tok: "Tokenizer", messages: Sequence[Message], mask: LossMask = "released"
) -> Rendered:
    """Returns a whole dialogue and which of its tokens are learnt; neither padded nor cut.

    `released`: `<|im_start|>`, `<|im_end|>` and the newline after it in every block, and what the
    assistant says. `assistant_only`: what the assistant says and its `<|im_end|>`, so that nothing
    of the question is learnt. Role names and pictures never are.

    Raises: ChatError for an unknown role or mask.
    Source: released `finetune.py`, `preprocess`. Differs: pictures in an answer are not learnt.
    """
    if mask not in get_args(LossMask):
        raise ChatError(f"mask must be 'released' or 'assistant_only': got {mask!r}")
    picture = {tok.image_start_id, tok.image_pad_id, tok.image_end_id}
    ids: list[int] = []
    is_target: list[bool] = []
    images: list[Any] = []
    for block in _blocks(tok, messages):
        targets = [False] * len(block.ids)
        if mask == "released":
            targets[0] = targets[-2] = targets[-1] = True
        if block.role == "assistant":
            targets[block.content] = [token not in picture for token in block.ids[block.content]]
            targets[-2] = True
        ids += block.ids
        is_target += targets
        images += block.images
    return Rendered(ids, is_target, images)


# --- blocks -------------------------------------------------------------------------------------


def _opening(tok: "Tokenizer", role: str) -> list[int]:
    return [tok.im_start_id, *_fixed_ids(tok, role), *_fixed_ids(tok, "\n")]


@functools.lru_cache(maxsize=32)
def _fixed_ids(tok: "Tokenizer", text: str) -> tuple[int, ...]:
    """Returns the ids of text that stands in every dialogue."""
    return tuple(tok.encode(text))


def _blocks(tok: "Tokenizer", messages: Iterable[Message]) -> list[_Block]:
    blocks: list[_Block] = []
    num_images = 0
    for message in messages:
        if message.role not in _ROLES:
            raise ChatError(f"a message's role must be one of {_ROLES}: got {message.role!r}")
        ids = _opening(tok, message.role)
        start = len(ids)
        content, images = _content_ids(tok, message, num_images)
        ids += content
        num_images += len(images)
        end = len(ids)
        ids += [tok.im_end_id, *_fixed_ids(tok, "\n")]
        blocks.append(_Block(message.role, ids, slice(start, end), images))
    return blocks


def _content_ids(
    tok: "Tokenizer", message: Message, num_images: int
) -> tuple[list[int], list[Any]]:
    """Returns the ids of a message's content and its pictures' sources.

    Neighbouring texts are joined before they are encoded: "\\n" and "\\nx" together are other ids
    than each alone.
    """
    parts = [message.content] if isinstance(message.content, str) else message.content
    ids: list[int] = []
    images: list[Any] = []
    text = ""

    def flush() -> None:
        nonlocal text
        ids.extend(tok.encode_tagged(text, message.live))
        text = ""

    for part in parts:
        if isinstance(part, str):
            text += part
            if "img" in message.live:
                images += tok.split_images(part)
        elif isinstance(part, Picture):
            images.append(part.source)
            text += f"Picture {num_images + len(images)}: "
            flush()
            ids += tok.image_ids()
            text = "\n"
        elif isinstance(part, Region):
            flush()
            ids += _region_ids(tok, part)
        else:
            raise ChatError(
                f"a message holds text, Picture and Region parts: got {type(part).__name__}"
            )
    flush()
    return ids, images


def _region_ids(tok: "Tokenizer", region: Region) -> list[int]:
    ids: list[int] = []
    if region.ref is not None:
        ids += [tok.ref_start_id, *tok.encode(region.ref), tok.ref_end_id]
    for box in region.boxes:
        ids += [tok.box_start_id, *tok.encode(box_text(box)), tok.box_end_id]
    for quad in region.quads:
        ids += [tok.quad_start_id, *tok.encode(quad_text(quad)), tok.quad_end_id]
    return ids
