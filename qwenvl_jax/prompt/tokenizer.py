"""Text to ids and back: Qwen's byte-level BPE, read from a `qwen.tiktoken` file.

A file of R ranks gives ids 0..R-1 to byte strings; the special tokens follow in a fixed order:

    R  <|endoftext|>    R+1  <|im_start|>    R+2  <|im_end|>    R+3..R+207  <|extra_0..204|>
    R+208..213  <ref> </ref> <box> </box> <quad> </quad>    R+214..216  <img> </img> <imgpad>

The released file has 151,643 ranks; nothing here knows that number, so small models bring small
files. A picture is `<img>`, `slots` times `<imgpad>`, `</img>`: its pixels travel beside the ids.
Source: released `tokenization_qwen.py`. Differs: text typed by a user never becomes a special
token, pictures' paths are not written into the slots, and decoding never raises.
"""

import functools
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import SupportsIndex

import tiktoken

from qwenvl_jax.prompt import chat
from qwenvl_jax.prompt.decoding import TextDecoder
from qwenvl_jax.prompt.vocabulary import TokenizerError, find_vocabulary, read_ranks

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_EXTRAS = 205
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(_NUM_EXTRAS)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"),
    *("<img>", "</img>", "<imgpad>"),
)

_TAG_TOKENS = {
    "ref": ("<ref>", "</ref>"),
    "box": ("<box>", "</box>"),
    "quad": ("<quad>", "</quad>"),
    "img": ("<img>", "</img>", "<imgpad>"),
}

# tiktoken's regular expression engine aborts the whole call on about a million white spaces in a
# row (its backtracking stack), so longer runs are cut here; no real prompt has one.
_LONGEST_SPACE = 50_000
_SPACE = re.compile(r"\s+")  # `\s{50000}` would look again from each place of a shorter run


def load_tokenizer(
    path: str | Path, slots: int = 256, image_start_id: int | None = None
) -> "Tokenizer":
    """Returns the tokenizer of a `qwen.tiktoken` file, or of the folder that holds one.

    `slots` is the number of ids a picture takes (the adapter's queries). `image_start_id`, where
    given, is the model's id of `<img>`: a vocabulary of another size is then refused, which is
    what notices a file cut off between two lines.

    Raises: TokenizerError where there is no such file, or it is not a whole vocabulary.
    """
    file = find_vocabulary(Path(path))
    tokenizer = Tokenizer(read_ranks(file), slots=slots)
    if image_start_id is not None and tokenizer.image_start_id != image_start_id:
        raise TokenizerError(
            f"{file} does not belong to this model: its {tokenizer.num_ranks} ranks put <img> at "
            f"id {tokenizer.image_start_id}, the model expects {image_start_id}; "
            "use the vocabulary that came with the weights (a cut-off copy also looks like this)"
        )
    return tokenizer


def _place_tags(tags: Sequence[str]) -> Sequence[str]:
    if unknown := [tag for tag in tags if tag not in chat.PLACE_TAGS]:
        raise TokenizerError(
            f"tags that may be live in text are {chat.PLACE_TAGS}: got {unknown}; "
            "pictures travel beside the text, and encode_raw takes trusted text"
        )
    return tags


def cut_images(text: str) -> list[str]:
    """Returns trusted text cut at its pictures: text, path, text, ..., text."""
    parts, end = [], 0
    while (start := text.find("<img>", end)) >= 0:
        close = text.find("</img>", start)
        if close < 0:
            raise TokenizerError(
                f"an <img> is not closed by </img>: got {text[start : start + 60]!r}; close it, "
                "or use encode, where <img> is plain text"
            )
        parts += [text[end:start], text[start + len("<img>") : close]]
        end = close + len("</img>")
    return [*parts, text[end:]]


class Tokenizer:
    """Text <-> ids of one vocabulary. Immutable; safe to share between threads and to pickle."""

    def __init__(self, ranks: dict[bytes, int], slots: int = 256):
        if slots <= 0:
            raise TokenizerError(f"slots must be positive: got {slots}")
        self.slots = slots
        self.num_ranks = len(ranks)
        self.special_ids = {token: self.num_ranks + i for i, token in enumerate(SPECIAL_TOKENS)}
        self._pieces = sorted(ranks, key=ranks.__getitem__)
        self._missing = {byte for byte in range(256) if bytes([byte]) not in ranks}
        self._bpe = tiktoken.Encoding(
            "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special_ids
        )
        ids = self.special_ids
        self.endoftext_id = ids["<|endoftext|>"]  # separator, end of generation and padding
        self.im_start_id, self.im_end_id = ids["<|im_start|>"], ids["<|im_end|>"]
        self.ref_start_id, self.ref_end_id = ids["<ref>"], ids["</ref>"]
        self.box_start_id, self.box_end_id = ids["<box>"], ids["</box>"]
        self.quad_start_id, self.quad_end_id = ids["<quad>"], ids["</quad>"]
        self.image_start_id, self.image_end_id = ids["<img>"], ids["</img>"]
        self.image_pad_id = ids["<imgpad>"]

    @property
    def vocab_size(self) -> int:
        """Ids in use. The model's embedding may have more rows (released: 76 more)."""
        return self.num_ranks + len(SPECIAL_TOKENS)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the vocabulary: equal for two that give every text the same ids.

        `slots` is no part of it, since text does not depend on it.
        """
        digest = hashlib.sha256()
        for piece in self._pieces:
            digest.update(len(piece).to_bytes(4, "little") + piece)
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, slots={self.slots})"

    def __reduce__(self):
        ranks = {piece: rank for rank, piece in enumerate(self._pieces)}
        return Tokenizer, (ranks, self.slots)

    # --- to ids ---------------------------------------------------------------------------------

    def encode(self, text: str, live: Sequence[str] = ()) -> list[int]:
        """Returns the ids of user text, NFC-normalised; never a special token.

        `live` names tags out of "ref", "box", "quad" that the caller wants as tokens where the
        text holds them; pictures and ChatML markers stay text whatever is asked.

        Raises: TokenizerError where `live` names something else.
        """
        return self.encode_tagged(text, _place_tags(live))

    def encode_raw(self, text: str) -> list[int]:
        """Returns the ids of trusted text: every special token in it is live.

        Each `<img>...</img>` becomes `<img>`, `slots` times `<imgpad>`, `</img>`; `split_images`
        gives what stood inside. For training data and for comparing with the released tokenizer,
        never for text from outside.

        Raises: TokenizerError where an `<img>` is not closed.
        """
        return self._encode_spans(text, frozenset(SPECIAL_TOKENS))

    def encode_tagged(self, text: str, live: Sequence[str]) -> list[int]:
        """Returns ids with the named tags live: any of "ref", "box", "quad", "img".

        The trusted form of `encode`, which chat assembling uses; "img" acts as in `encode_raw`.
        """
        allowed = frozenset(token for tag in live for token in _TAG_TOKENS[tag])
        if "<img>" in allowed:
            return self._encode_spans(text, allowed)
        return self._encode_text(text, allowed)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Returns the ids of one token's bytes, whatever they are: how this vocabulary spells it.

        Raises: TokenizerError where it lacks one of the bytes.
        """
        if missing := self._missing & set(data):
            raise TokenizerError(f"this vocabulary has no token for byte {min(missing):#04x}")
        return self._bpe._encode_single_piece(data)  # the one call that takes bytes

    def image_ids(self) -> list[int]:
        """Returns the ids of one picture: `<img>`, its slots, `</img>`."""
        return [self.image_start_id, *[self.image_pad_id] * self.slots, self.image_end_id]

    def split_images(self, text: str) -> list[str]:
        """Returns what stands inside each `<img>...</img>` of trusted text, exactly as typed.

        Any length, no normalisation: file names that are not NFC stay themselves.

        Raises: TokenizerError where an `<img>` is not closed.
        """
        return cut_images(text)[1::2]

    def _encode_spans(self, text: str, allowed: frozenset[str]) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(cut_images(text)):
            ids += self.image_ids() if i % 2 else self._encode_text(part, allowed)
        return ids

    def _encode_text(self, text: str, allowed: frozenset[str]) -> list[int]:
        text = unicodedata.normalize("NFC", text)
        if self._missing and (bad := self._missing & set(text.encode("utf-8", "replace"))):
            raise TokenizerError(
                f"this vocabulary has no token for byte {min(bad):#04x}, which the text "
                f"{text[:40]!r} needs: its file has only {self.num_ranks} ranks"
            )
        longest = _LONGEST_SPACE
        runs = (match.span() for match in _SPACE.finditer(text)) if len(text) > longest else ()
        inner = (cut for a, b in runs for cut in range(a + longest, b + 1, longest))
        cuts = [0, *inner, len(text)]
        ids: list[int] = []
        for start, end in itertools.pairwise(cuts):
            ids += self._bpe.encode(
                text[start:end], allowed_special=set(allowed), disallowed_special=()
            )
        return ids

    # --- to text --------------------------------------------------------------------------------

    def decode(
        self, ids: Iterable[SupportsIndex], skip_special: bool = False, keep: Sequence[str] = ()
    ) -> str:
        """Returns the text of any ids; never raises on a number.

        A picture reads `<img>path</img>`: ids made by the released tokenizer carry the path's
        bytes in their slots; ours carry none, so it reads `<img></img>` and encodes back to the
        same ids. `skip_special` leaves out special tokens, except the tags named in `keep`
        ("ref", "box", "quad"). Bytes that are not UTF-8 and ids outside the vocabulary (also the
        unused rows of the embedding) read U+FFFD; `skip_special` leaves such ids out.
        """
        decoder = self.stream(skip_special=skip_special, keep=keep)
        return decoder.push(ids) + decoder.finish()

    def stream(self, skip_special: bool = False, keep: Sequence[str] = ()) -> TextDecoder:
        """Returns a decoder that takes ids as they come: pushed texts join to `decode`'s text."""
        kept = {token for tag in _place_tags(keep) for token in _TAG_TOKENS[tag]}
        shown = {
            i: b"" if skip_special and token not in kept else token.encode()
            for token, i in self.special_ids.items()
        }
        return TextDecoder(
            pieces=self._pieces,
            special=shown,
            unknown=b"" if skip_special else "\ufffd".encode(),
            image=(self.image_start_id, self.image_end_id, self.image_pad_id),
            max_span=max(self.slots, 256),
        )

    # --- chat -----------------------------------------------------------------------------------

    def chat_ids(
        self,
        turns: Sequence[chat.Turn],
        system: str = chat.DEFAULT_SYSTEM,
        max_window: int = chat.RELEASED_WINDOW,
        raw: bool = False,
        live: Sequence[str] = (),
    ) -> list[int]:
        """Returns the ChatML prompt of `[(user, assistant), ..., (user, None)]`.

        The oldest turns are dropped as the released chat does it (`chat.render_prompt`). `live` as
        in `encode`; `raw=True` makes picture and box tags live as in the released chat, ChatML
        markers in the text never.

            >>> tok.chat_ids([("What is it?", None)])

        Raises: ChatError where the last turn is answered or another is not, TokenizerError where
        both `raw` and `live` are given.
        """
        if raw and live:
            raise TokenizerError("raw=True makes every tag live already: leave out `live`")
        tags = chat.RELEASED_CHAT_TAGS if raw else _place_tags(live)
        messages = chat.messages_from_turns(turns, system, tags)
        return chat.render_prompt(self, messages, max_window=max_window).ids
