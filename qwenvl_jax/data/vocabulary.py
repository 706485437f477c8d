"""Learns a byte-pair vocabulary and writes it as a `qwen.tiktoken` file, or adds ranks to one.

The small model's first file was made by

    python -m qwenvl_jax.data.vocabulary configs/nano/scenes.tiktoken --merges 400

from sentences of the scenes' training split in every task. Drawn words stay out of the corpus, so
they are spelled letter by letter and a word never drawn in training can still be read. What it
learned later came with words of collages and with the signs of Chinese, behind the ranks it had:

    python -m qwenvl_jax.data.vocabulary configs/nano/wide.tiktoken --merges 2000 \\
        --grow configs/nano/scenes.tiktoken --samples 4000 \\
        --objects /usr/share/tuxpaint/stamps/animals /usr/share/tuxpaint/stamps/food

Every Chinese sign is a piece of its own there, so that names and phrases stay made of signs.
"""

import argparse
import base64
import collections
import itertools
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import regex

from qwenvl_jax.data.sources.collages import Collages
from qwenvl_jax.data.sources.page_rows import question_words
from qwenvl_jax.data.sources.scene_rows import LISTS, TASKS, scene_example
from qwenvl_jax.data.sources.written_text import sentence
from qwenvl_jax.data.tasks import example_of
from qwenvl_jax.prompt.tokenizer import SPLIT_PATTERN, Tokenizer
from qwenvl_jax.prompt.vocabulary import read_ranks

Pair = tuple[bytes, bytes]

BYTES = tuple(bytes([byte]) for byte in range(256))

_TAG = re.compile(r"<[^<>]*>")
_DRAWN_WORD = re.compile(r"\b(?!OCR\b)[A-Z]{2,}\b")
_HAN = re.compile(r"([\u4e00-\u9fff])")


def train_bpe(texts: Iterable[str], merges: int, known: Sequence[bytes] = BYTES) -> list[bytes]:
    """Returns the known entries and then up to so many merged ones; the index is the rank.

    The most frequent neighbouring pair inside a piece of Qwen's splitting pattern is merged first,
    the smaller bytes on a tie, so the result is a pure function of the texts. It ends early where
    no pair occurs twice. Pieces start as `known` spells them, the 256 bytes unless given.

        >>> train_bpe(["aab aab"], 1)[-1]
        b'aa'
    """
    pieces: collections.Counter[str] = collections.Counter()
    splitter = regex.compile(SPLIT_PATTERN)
    for text in texts:
        pieces.update(splitter.findall(text))
    spell = _speller(known)
    words = {piece: tuple(known[i] for i in spell.encode(piece)) for piece in sorted(pieces)}
    vocabulary = list(known)
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


def _speller(entries: Sequence[bytes]) -> Tokenizer:
    return Tokenizer({entry: rank for rank, entry in enumerate(entries)}, slots=1)


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
    spell = _speller(BYTES)
    spoken = [task for task in TASKS if task not in LISTS]  # lists are not sentences
    for key in range(count):
        task = spoken[key % len(spoken)]
        sample = scene_example(task, key, "train", 112, spell)
        yield from _TAG.split(_DRAWN_WORD.sub("", spell.decode(sample.ids.tolist())))


def wide_sentences(count: int, folders: Sequence[Path]) -> Iterable[str]:
    """Yields what is said about collages of each folder's objects and about pages, both languages.

    Chinese signs come one by one. The lines of a page are told letter by letter in English, so
    only their Chinese signs are here.
    """
    spell = _speller(BYTES)
    for folder in folders:
        source = Collages(count // len(folders), "train", side=64, folder=folder)
        for index in range(len(source)):
            said = spell.decode(example_of(source[index], spell).ids.tolist())
            yield from apart(_TAG.split(said))
    rng = random.Random("vocabulary")
    for _ in range(count // 10):
        yield from apart([sentence("zh", rng, has_senseless=False)])
        yield from apart(words.replace("{}", " ") for words in question_words())


def apart(texts: Iterable[str]) -> Iterable[str]:
    """Yields the texts cut before and behind every Chinese sign.

    >>> list(apart(["a 图中"]))
    ['a ', '图', '中']
    """
    for text in texts:
        yield from filter(None, _HAN.split(text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the qwen.tiktoken file to write")
    parser.add_argument("--merges", type=int, default=400)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--grow", type=Path, help="the file to add ranks to")
    parser.add_argument("--objects", type=Path, nargs="+", help="folders of cut-outs, to grow by")
    arguments = parser.parse_args()
    if (arguments.grow is None) != (arguments.objects is None):
        parser.error("--grow and --objects go together: got only one of them")
    known, texts = BYTES, scene_sentences(arguments.samples)
    if arguments.grow is not None:
        ranks = read_ranks(arguments.grow)
        known = sorted(ranks, key=ranks.__getitem__)
        texts = wide_sentences(arguments.samples, arguments.objects)
    vocabulary = train_bpe(texts, arguments.merges, known)
    write_tiktoken(vocabulary, arguments.output)
    print(f"{arguments.output}: {len(vocabulary)} ranks")


if __name__ == "__main__":
    main()
