"""Where each row lies in a JSON list or in a file of JSON lines, found without parsing the rows.

The file is mapped and looked at in blocks that fit a cache. In a block only quotes, backslashes,
brackets and line ends matter; numpy finds them, tells which quotes are escaped, which brackets
stand inside strings, and how deep the others nest. What is kept of a row is three numbers.

Sizes: N rows.
"""

import json
import mmap
import stat
import zlib
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_ROW_BYTES = 64 * 2**20  # a longer row is no conversation, and would not be read in pieces
_BLOCK = 1 << 18  # bytes; with its work arrays it stays in a core's cache
_GAP_ROWS = 1 << 15  # gaps between rows that are checked together
_MAX_GAP = 4096  # bytes of white space and one comma between two rows

_BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r\n"
_QUOTE, _BACKSLASH, _NEWLINE, _COMMA = b'"\\\n,'
_FOREIGN = (
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"\x1f\x8b", "gzip data"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PAR1", "a parquet file"),
)

_IS_WHITE = np.zeros(256, bool)
_IS_WHITE[list(_WHITE)] = True
_STEP = np.zeros(256, np.int8)  # of the depth
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1


class RowTable(NamedTuple):
    """The places of a file's rows. `damage` says what is wrong past or between them."""

    starts: np.ndarray  # int64 [N], bytes from the start of the file
    ends: np.ndarray  # int64 [N], one past the last byte
    lines: np.ndarray  # int64 [N], the line that a row begins in, counted from 1
    num_bytes: int
    digest: str  # of all bytes and places: another one means that some row has changed
    damage: str | None = None


def find_rows(path: Path) -> RowTable:
    """Returns the places of all rows of a UTF-8 file: a JSON list, or one JSON object a line.

    Which of the two, the first character tells. Rows are not parsed; a broken one is found when it
    is read, except where it hides the borders of the rows after it: then `damage` names it, and the
    table holds the rows before.

    Raises: OSError where the file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return _no_rows(0, "is not a file: got a pipe or a device; save it as a file first")
    with path.open("rb") as file:
        if status.st_size == 0:
            return _no_rows(0, "holds no rows: got an empty file")
        view_B = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    first = _first_not_white(view_B, len(_BOM) * (view_B[: len(_BOM)].tobytes() == _BOM))
    if first is None:
        return _no_rows(len(view_B), "holds no rows: got white space only")
    head = view_B[first : first + 4].tobytes()
    if head.startswith(b"["):
        starts, ends, lines, damage = _rows_of_list(view_B, first)
    elif head.startswith(b"{"):
        starts, ends, lines, damage = _rows_of_lines(view_B, first)
    else:
        kind = next((name for start, name in _FOREIGN if head.startswith(start)), "")
        got = kind or f"{head.decode('utf-8', 'replace')!r} as its start"
        return _no_rows(
            len(view_B),
            f"is not JSON in UTF-8: got {got}, expected a list [...] or one {{...}} a line",
        )
    if damage is None and len(starts) == 0:
        damage = "holds no rows: got an empty list"
    return RowTable(starts, ends, lines, len(view_B), _digest(view_B, starts, ends), damage)


def _no_rows(num_bytes: int, damage: str) -> RowTable:
    none_N = np.zeros(0, np.int64)
    return RowTable(none_N, none_N, none_N, num_bytes, "", damage)


def _digest(view_B: np.ndarray, starts_N: np.ndarray, ends_N: np.ndarray) -> str:
    content = 0
    for begin in range(0, len(view_B), _BLOCK):
        content = zlib.crc32(view_B[begin : begin + _BLOCK].data, content)
    digest = blake2b(content.to_bytes(4, "little"), digest_size=16)
    for places_N in (starts_N, ends_N):
        digest.update(np.ascontiguousarray(places_N, "<i8").data)
    return digest.hexdigest()


# --- a list -------------------------------------------------------------------------------------


class _ListScan:
    """What is known after the blocks so far: open strings and brackets, and the rows' places."""

    def __init__(self):
        self.depth = 0
        self.line = 1
        self.closed: int | None = None  # where the list's own bracket closes
        self.starts: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self.lines: list[np.ndarray] = []
        self._is_in_string = False
        self._is_escaping = False  # the last block ended in an odd run of backslashes
        self._folded = np.empty(_BLOCK, np.uint8)
        self._marks = np.empty((2, _BLOCK), bool)

    def take(self, block_B: np.ndarray, begin: int) -> None:
        """Goes on with the block that starts at byte `begin`."""
        at = np.flatnonzero(self._marked(block_B))
        byte = block_B[at]
        is_quote = (byte == _QUOTE) & ~self._escaped(at, byte, len(block_B))
        is_inside = (self._is_in_string + np.cumsum(is_quote)) & 1
        step = _STEP[byte]
        step[is_inside == 1] = 0
        depth = self.depth + np.cumsum(step)
        line = self.line + np.cumsum(byte == _NEWLINE)
        is_closing = (step < 0) & (depth == 0)
        if is_closing.any():
            last = int(is_closing.argmax())
            self.closed = begin + int(at[last])
            at, step, depth, line = (values[:last] for values in (at, step, depth, line))
        is_start, is_end = (step > 0) & (depth == 2), (step < 0) & (depth == 1)
        self.starts.append(at[is_start] + begin)
        self.lines.append(line[is_start])
        self.ends.append(at[is_end] + begin + 1)
        if len(depth):
            self.depth, self.line = int(depth[-1]), int(line[-1])
            self._is_in_string = bool(is_inside[-1])

    def _marked(self, block_B: np.ndarray) -> np.ndarray:
        """Returns where bytes that matter are: with bit 5 set, [ \\ ] read { | }, neighbours."""
        folded, (is_mark, is_byte) = self._folded[: len(block_B)], self._marks[:, : len(block_B)]
        np.bitwise_or(block_B, 0x20, out=folded)
        np.subtract(folded, ord("{"), out=folded)
        np.less_equal(folded, 2, out=is_mark)
        for byte in (_QUOTE, _NEWLINE):
            np.equal(block_B, byte, out=is_byte)
            np.logical_or(is_mark, is_byte, out=is_mark)
        return is_mark

    def _escaped(self, at: np.ndarray, byte: np.ndarray, length: int) -> np.ndarray:
        """Returns which marks follow an odd run of backslashes."""
        is_slash = byte == _BACKSLASH
        carried, self._is_escaping = self._is_escaping, False
        escaped = np.zeros(len(at), bool)
        if len(at) == 0 or not (carried or is_slash.any()):
            return escaped
        follows = np.zeros(len(at), bool)
        follows[1:] = is_slash[:-1] & (np.diff(at) == 1)
        begins = np.where(is_slash & ~follows, at, -2)
        if at[0] == 0 and is_slash[0]:
            begins[0] -= carried
        begins = np.maximum.accumulate(begins)
        escaped[1:] = follows[1:] & ((at[1:] - begins[:-1]) % 2 == 1)
        if at[0] == 0:
            escaped[0] = carried
        if is_slash[-1] and at[-1] == length - 1:
            self._is_escaping = bool((length - begins[-1]) % 2)
        return escaped


def _rows_of_list(
    view_B: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str | None]:
    """Returns starts, ends, lines and damage of a list whose bracket opens at `first`."""
    scan = _ListScan()
    scan.line = _line_at(view_B, first)
    for begin in range(first, len(view_B), _BLOCK):
        scan.take(view_B[begin : begin + _BLOCK], begin)
        if scan.closed is not None:
            break
    starts, ends, lines = (np.concatenate(p) for p in (scan.starts, scan.ends, scan.lines))
    whole = len(ends)
    if scan.closed is None:
        place = f" in row {whole}, line {lines[-1]}" if len(starts) > whole else ""
        damage = f"is cut off{place}: got no ] at the end of the list; copy the file again"
    else:
        damage = _wrong_gap(view_B, first + 1, starts, ends, scan.closed)
        damage = damage or _wrong_end(view_B, scan.closed)
    starts, lines = starts[:whole], lines[:whole]
    if damage is not None:
        # An odd quote turns strings and structure round, so the first broken row is what is wrong.
        for i, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            if (fault := _json_fault(view_B, start, end)) is not None:
                damage = f"hides its rows after a broken one: row {i}, line {lines[i]}, is {fault}"
                return starts[:i], ends[:i], lines[:i], damage
    return starts, ends, lines, damage


def _wrong_gap(
    view_B: np.ndarray, opened: int, starts_N: np.ndarray, ends_N: np.ndarray, closed: int
) -> str | None:
    """Returns what is wrong with the first gap that is not white space with one comma."""
    begins = np.concatenate([[opened], ends_N])
    stops = np.concatenate([starts_N, [closed]])
    num_commas = np.ones(len(stops), np.int64)
    num_commas[[0, -1]] = 0
    for chunk in range(0, len(stops), _GAP_ROWS):
        part = slice(chunk, chunk + _GAP_ROWS)
        sizes = np.minimum(stops[part] - begins[part], _MAX_GAP)
        gap = np.repeat(np.arange(len(sizes)), sizes)
        offsets = np.arange(len(gap)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        byte = view_B[begins[part][gap] + offsets]
        is_comma = byte == _COMMA
        is_wrong = np.bincount(gap[is_comma], minlength=len(sizes)) != num_commas[part]
        is_wrong[gap[~(is_comma | _IS_WHITE[byte])]] = True
        is_wrong |= sizes == _MAX_GAP
        if is_wrong.any():
            i = chunk + int(is_wrong.argmax())
            begin, stop = int(begins[i]), int(stops[i])
            place = f"before row {i}" if i < len(starts_N) else "at the end of its list"
            return (
                f"has something else than rows {place}, line {_line_at(view_B, begin)}: got "
                f"{_excerpt(view_B, begin, stop)}, expected "
                f"{'one comma' if num_commas[i] else 'nothing'}; each row must be one {{...}}"
            )
    return None


def _wrong_end(view_B: np.ndarray, closed: int) -> str | None:
    after = _first_not_white(view_B, closed + 1)
    if view_B[closed] != ord("]"):
        after = closed
    if after is None:
        return None
    return (
        f"goes on after the end of its list, in line {_line_at(view_B, after)}: got "
        f"{_excerpt(view_B, after)}; all rows must be in one list [...]"
    )


# --- lines --------------------------------------------------------------------------------------


def _rows_of_lines(
    view_B: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, str | None]:
    """Returns starts, ends, lines and damage of a file with one object a line; blank lines go."""
    breaks = [
        np.flatnonzero(view_B[begin : begin + _BLOCK] == _NEWLINE) + begin
        for begin in range(first, len(view_B), _BLOCK)
    ]
    ends = np.concatenate([*breaks, [len(view_B)]])
    starts = np.concatenate([[first], ends[:-1] + 1])
    lines = np.arange(len(starts)) + _line_at(view_B, first)
    is_row = ends > starts
    is_row[is_row] = ~_IS_WHITE[view_B[starts[is_row]]]
    for i in np.flatnonzero(~is_row & (ends > starts)):  # blank, or a row that is indented
        is_row[i] = bool(view_B[starts[i] : ends[i]].tobytes().strip(_WHITE))
    starts, ends, lines = starts[is_row], ends[is_row], lines[is_row]
    wrong = _json_fault(view_B, int(starts[0]), int(ends[0]))
    if wrong is not None:
        damage = (
            f"is neither a list of rows nor one row a line: line {lines[0]} is {wrong}; "
            "where the file is one object, take the list of rows out of it"
        )
        return starts[:0], ends[:0], lines[:0], damage
    wrong = _json_fault(view_B, int(starts[-1]), int(ends[-1]))
    if wrong is not None:
        damage = f"is cut off in its last row: line {lines[-1]} is {wrong}; copy the file again"
        return starts[:-1], ends[:-1], lines[:-1], damage
    return starts, ends, lines, None


# --- words about places -------------------------------------------------------------------------


def parse_row(data: bytes) -> object:
    """Returns what a row's bytes hold.

    Raises: ValueError where they are not JSON in UTF-8, in one line that says why.
    """
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_once_each)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at its byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at its character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return found


def _json_fault(view_B: np.ndarray, start: int, end: int) -> str | None:
    if end - start > MAX_ROW_BYTES:
        return f"too long: got {end - start} bytes, expected at most {MAX_ROW_BYTES}"
    try:
        parse_row(view_B[start:end].tobytes())
    except ValueError as error:
        return f"not JSON: {error}"
    return None


def _line_at(view_B: np.ndarray, offset: int) -> int:
    blocks = (view_B[begin : min(begin + _BLOCK, offset)] for begin in range(0, offset, _BLOCK))
    return 1 + sum(int(np.count_nonzero(block_B == _NEWLINE)) for block_B in blocks)


def _first_not_white(view_B: np.ndarray, start: int) -> int | None:
    for begin in range(start, len(view_B), _BLOCK):
        found = np.flatnonzero(~_IS_WHITE[view_B[begin : begin + _BLOCK]])
        if len(found):
            return begin + int(found[0])
    return None


def _excerpt(view_B: np.ndarray, start: int, end: int | None = None) -> str:
    shown = view_B[start : min(start + 40, len(view_B) if end is None else end)]
    return repr(shown.tobytes().decode("utf-8", "replace"))
