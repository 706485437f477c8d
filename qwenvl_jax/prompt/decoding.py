"""Ids to text as they arrive: one small state machine behind `decode` and streaming alike."""

import codecs
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex


class TextDecoder:
    """Turns ids into text piece by piece; `push` everything, then `finish`.

    What `push` returns is final: characters whose bytes are split over ids, and a picture's span,
    are held back until they are whole. The joined text is the same however the ids are cut.
    Made by `Tokenizer.stream`.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        special: Mapping[int, bytes],
        unknown: bytes,
        image: tuple[int, int, int],
        max_span: int,
    ):
        self._pieces = pieces
        self._special = special
        self._unknown = unknown
        self._start, self._end, self._pad = image
        self._max_span = max_span
        self._span: list[int] | None = None  # ids since an open <img>
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: SupportsIndex | Iterable[SupportsIndex]) -> str:
        """Returns the text that is certain after these ids (one id, a list or an array)."""
        # One call for a device array: walking it would fetch its elements one by one.
        values: Any = getattr(ids, "tolist", lambda: ids)()
        if not isinstance(values, Iterable):
            values = (values,)
        return self._utf8.decode(b"".join(self._take(operator.index(i)) for i in values))

    def finish(self) -> str:
        """Returns the held-back rest; unfinished bytes read U+FFFD. The decoder can be reused."""
        text = self._utf8.decode(self._give_up_span(), final=True)
        self._utf8.reset()
        return text

    def _plain(self, token: int) -> bytes:
        if 0 <= token < len(self._pieces):
            return self._pieces[token]
        return self._special.get(token, self._unknown)

    def _take(self, token: int) -> bytes:
        given_up = b""
        if self._span is not None:
            if token == self._end:
                return self._close_span()
            if self._continues_span(token):
                self._span.append(token)
                return b""
            given_up = self._give_up_span()
        if token == self._start:
            self._span = []
            return given_up
        return given_up + self._plain(token)

    def _continues_span(self, token: int) -> bool:
        """A span is path bytes, then slots: anything else is not a picture."""
        span = self._span or []
        if len(span) == self._max_span:
            return False
        is_byte = 0 <= token < min(256, len(self._pieces))
        return token == self._pad or (is_byte and (not span or span[-1] != self._pad))

    def _close_span(self) -> bytes:
        span = self._span or []
        path = bytes(token for token in span if token != self._pad)
        # A path that filled every slot has none left over; a shorter run is ordinary text that
        # happens to stand between the two tags.
        if path and len(path) == len(span) != self._max_span:
            return self._give_up_span() + self._plain(self._end)
        self._span = None
        return self._plain(self._start) + path + self._plain(self._end)

    def _give_up_span(self) -> bytes:
        if self._span is None:
            return b""
        ids, self._span = [self._start, *self._span], None
        return b"".join(map(self._plain, ids))
