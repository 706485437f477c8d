"""How one vocabulary spells the tokens of another, so that weights can move from id to id."""

from collections.abc import Sequence
from pathlib import Path

from qwenvl_jax.prompt.tokenizer import SPECIAL_TOKENS, Tokenizer
from qwenvl_jax.prompt.vocabulary import find_vocabulary, read_ranks

Spelling = tuple[int, ...]


def respelled(vocabulary: str | Path, old: Tokenizer) -> tuple[Tokenizer, list[Spelling]]:
    """Returns the tokenizer of another file, and for each of its ids the old ids that spell it.

    Raises: TokenizerError where the file is no whole vocabulary, or the old one lacks a byte.
    """
    ranks = read_ranks(find_vocabulary(Path(vocabulary)))
    entries = sorted(ranks, key=ranks.__getitem__)
    return Tokenizer(ranks, slots=old.slots), spellings(entries, old)


def spellings(entries: Sequence[bytes], old: Tokenizer) -> list[Spelling]:
    """Returns the old ids of each entry, in the order given, and then of each special token.

    Raises: TokenizerError where the old vocabulary lacks a byte that an entry needs.
    """
    special = [(old.special_ids[token],) for token in SPECIAL_TOKENS]
    return [*(tuple(old.encode_bytes(entry)) for entry in entries), *special]
