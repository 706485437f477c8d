"""Learns a byte-pair vocabulary and writes it as a `qwen.tiktoken` file.

The shipped small model's file was made by

    python -m qwenvl_jax.data.vocabulary qwenvl_jax/assets/nano/qwen.tiktoken --merges 400

from sentences of the scenes' training split in every task. Drawn words stay out of the corpus, so
they are spelled letter by letter and a word never drawn in training can still be read.
"""

import argparse
import base64
import collections
import itertools
import re
from collections.abc import Iterable
from pathlib import Path

import regex

from qwenvl_jax.data.sources.scene_rows import LISTS, TASKS, scene_example
from qwenvl_jax.prompt.tokenizer import SPLIT_PATTERN, Tokenizer

Pair = tuple[bytes, bytes]

_TAG = re.compile(r"<[^<>]*>")
_DRAWN_WORD = re.compile(r"\b(?!OCR\b)[A-Z]{2,}\b")


def train_bpe(texts: Iterable[str], merges: int) -> list[bytes]:
    """Returns the 256 bytes and then up to so many merged byte strings; the index is the rank.

    The most frequent neighbouring pair inside a piece of Qwen's splitting pattern is merged first,
    the smaller bytes on a tie, so the result is a pure function of the texts. It ends early where
    no pair occurs twice.

        >>> train_bpe(["aab aab"], 1)[-1]
        b'aa'
    """
    pieces: collections.Counter[bytes] = collections.Counter()
    splitter = regex.compile(SPLIT_PATTERN)
    for text in texts:
        pieces.update(piece.encode() for piece in splitter.findall(text))
    words = {piece: tuple(bytes([byte]) for byte in piece) for piece in sorted(pieces)}
    vocabulary = [bytes([byte]) for byte in range(256)]
    for _ in range(merges):
        pairs: collections.Counter[Pair] = collections.Counter()
        for piece, parts in words.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += pieces[piece]
        best, count = min(pairs.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        if best is None or count < 2:
            break
        vocabulary.append(best[0] + best[1])
        words = {piece: _merge(parts, best) for piece, parts in words.items()}
    return vocabulary


def _merge(parts: tuple[bytes, ...], pair: Pair) -> tuple[bytes, ...]:
    merged: list[bytes] = []
    i = 0
    while i < len(parts):
        if parts[i : i + 2] == pair:
            merged.append(parts[i] + parts[i + 1])
            i += 2
        else:
            merged.append(parts[i])
            i += 1
    return tuple(merged)


def write_tiktoken(vocabulary: Iterable[bytes], path: Path) -> None:
    """Writes one line `base64 rank` for each entry."""
    lines = [
        f"{base64.b64encode(entry).decode()} {rank}\n" for rank, entry in enumerate(vocabulary)
    ]
    path.write_text("".join(lines), encoding="ascii")


def scene_sentences(count: int) -> Iterable[str]:
    """Yields the text between tags of samples of every spoken task in turn, without drawn words."""
    spell = Tokenizer({bytes([byte]): byte for byte in range(256)}, slots=1)
    spoken = [task for task in TASKS if task not in LISTS]  # lists are not sentences
    for key in range(count):
        task = spoken[key % len(spoken)]
        sample = scene_example(task, key, "train", 112, spell)
        yield from _TAG.split(_DRAWN_WORD.sub("", spell.decode(sample.ids.tolist())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the qwen.tiktoken file to write")
    parser.add_argument("--merges", type=int, default=400)
    parser.add_argument("--samples", type=int, default=20_000)
    arguments = parser.parse_args()
    vocabulary = train_bpe(scene_sentences(arguments.samples), arguments.merges)
    write_tiktoken(vocabulary, arguments.output)
    print(f"{arguments.output}: {len(vocabulary)} ranks")


if __name__ == "__main__":
    main()
