"""Caption scores as the COCO caption toolkit gives them: CIDEr (its CIDEr-D), BLEU, ROUGE-L.

The toolkit's tokens come from a Java program. `ptb` gives the same tokens without it, so a score is
one number on every machine; `tokenizer="java"` runs the program itself, to check that.
"""

import collections
import importlib.util
import math
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qwenvl_jax.evaluation import ptb
from qwenvl_jax.words import counted

MAX_NGRAM = 4
CIDER_SIGMA = 6.0  # of the penalty on a difference in length
CIDER_SCALE = 10.0
ROUGE_BETA = 1.2
TINY, SMALL = 1e-15, 1e-9  # BLEU's numerators and denominators, so that nothing divides by zero

Tokenizer = Literal["own", "java"]
Predictions = Mapping[Any, str] | Sequence[str]
References = Mapping[Any, Sequence[str]] | Sequence[Sequence[str]]
Counts = collections.Counter[tuple[str, ...]]


class CaptionScores(NamedTuple):
    """Scores over a set of pictures; published CIDEr figures are 100 times `cider`."""

    cider: float
    cider_per_image: list[float]
    bleu: list[float]  # BLEU-1 to BLEU-4
    rouge_l: float
    tokenizer: Tokenizer


def cider(
    predictions: Predictions, references: References, *, tokenizer: Tokenizer = "own"
) -> float:
    """CIDEr of one caption a picture against its references; times 100 is the published scale.

    Both are lists in the same order, or mappings with the same keys.

    >>> cider(["a cat", "a dog"], [["a cat"], ["a dog", "the dog"]]) > 2
    True

    Quirks: it is CIDEr-D; word weights come from the references at hand, so scores of different
      sets of pictures, or of a subset, cannot be compared.

    Source: released `eval_mm/evaluate_caption.py`, which calls pycocoevalcap.
    """
    return score_captions(predictions, references, tokenizer=tokenizer).cider


def score_captions(
    predictions: Predictions, references: References, *, tokenizer: Tokenizer = "own"
) -> CaptionScores:
    """All scores of one caption a picture against its references; arguments as in `cider`."""
    captions, golds = _aligned(predictions, references)
    tokenize = ptb.tokenize if tokenizer == "own" else java_tokenize
    # joined and parted again, as the toolkit does: a token with a no-break space is one token for
    # ROUGE and two for the others
    texts = [" ".join(tokens) for tokens in tokenize(captions)]
    flat = iter([" ".join(tokens) for tokens in tokenize([g for gold in golds for g in gold])])
    gold_texts = [[next(flat) for _ in gold] for gold in golds]
    words = [text.split() for text in texts]
    gold_words = [[text.split() for text in group] for group in gold_texts]
    per_image = _cider_per_image(words, gold_words)
    rouge = [_rouge_l(text, group) for text, group in zip(texts, gold_texts, strict=True)]
    return CaptionScores(
        cider=sum(per_image) / len(per_image),
        cider_per_image=per_image,
        bleu=_bleu(words, gold_words),
        rouge_l=sum(rouge) / len(rouge),
        tokenizer=tokenizer,
    )


def java_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """The same as `ptb.tokenize`, from the official program; needs Java and pycocoevalcap.

    Raises:
      RuntimeError: one of them is not installed, or the program failed.
    """
    package, java = importlib.util.find_spec("pycocoevalcap"), shutil.which("java")
    if package is None or not package.submodule_search_locations or java is None:
        raise RuntimeError(
            "the official tokenizer needs Java and the package pycocoevalcap: got neither or one; "
            'install both, or use tokenizer="own"'
        )
    folder = pathlib.Path(package.submodule_search_locations[0], "tokenizer")
    jars = ":".join(str(path) for path in folder.glob("*.jar"))
    command = [java, "-cp", jars, "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "".join(" ".join(caption.splitlines()) + "\n" for caption in captions)
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"],
        input=lines.encode(),
        capture_output=True,
        check=False,
    )
    rows = done.stdout.decode().split("\n")
    if done.returncode or len(rows) < len(captions):
        raise RuntimeError(f"the official tokenizer failed: {done.stderr.decode()[-500:]}")
    return [
        [token for token in row.split(" ") if token and token not in ptb.PUNCTUATION]
        for row in rows[: len(captions)]
    ]


def _aligned(
    predictions: Predictions, references: References
) -> tuple[list[str], list[Sequence[str]]]:
    if isinstance(predictions, Mapping) and isinstance(references, Mapping):
        unmatched = [str(key) for key in predictions.keys() ^ references.keys()]
        if unmatched:
            raise ValueError(
                f"predictions and references must have the same keys: {len(unmatched)} are in one "
                f"of them only, such as {sorted(unmatched)[:3]}"
            )
        captions = list(predictions.values())
        golds = [references[key] for key in predictions]
    elif isinstance(predictions, Mapping) or isinstance(references, Mapping):
        raise ValueError("predictions and references must both be lists or both be mappings")
    else:
        captions, golds = list(predictions), list(references)
    if len(captions) != len(golds) or not captions:
        raise ValueError(
            f"each caption needs its references: got {counted(len(captions), 'caption')} and "
            f"{counted(len(golds), 'list')} of references"
        )
    for at, gold in enumerate(golds):
        if isinstance(gold, str) or not gold:
            raise ValueError(
                f"references of caption {at}: got {gold!r}, expected a list of at least one text"
            )
    return captions, golds


def _ngrams(words: list[str]) -> Counts:
    return collections.Counter(
        tuple(words[at : at + n])
        for n in range(1, MAX_NGRAM + 1)
        for at in range(len(words) - n + 1)
    )


# --- CIDEr --------------------------------------------------------------------------------------


class _Vector(NamedTuple):
    """A caption as weighted n-grams, its norm for each n, and its length."""

    weights: dict[tuple[str, ...], float]
    norms: list[float]
    length: int  # in words


def _cider_per_image(captions: list[list[str]], golds: list[list[list[str]]]) -> list[float]:
    gold_counts = [[_ngrams(gold) for gold in group] for group in golds]
    document_frequency = collections.Counter(
        ngram for group in gold_counts for ngram in set().union(*group)
    )
    log_images = math.log(len(golds))
    rarity = {
        ngram: log_images - math.log(frequency) for ngram, frequency in document_frequency.items()
    }
    scores = []
    for caption, group in zip(captions, gold_counts, strict=True):
        ours = _vector(_ngrams(caption), rarity, log_images)
        similar = [_similarity(ours, _vector(counts, rarity, log_images)) for counts in group]
        scores.append(CIDER_SCALE * sum(similar) / len(similar))
    return scores


def _vector(counts: Counts, rarity: dict[tuple[str, ...], float], unseen: float) -> _Vector:
    weights = {ngram: count * rarity.get(ngram, unseen) for ngram, count in counts.items()}
    squares = [0.0] * MAX_NGRAM
    for ngram, weight in weights.items():
        squares[len(ngram) - 1] += weight**2
    length = sum(count for ngram, count in counts.items() if len(ngram) == 1)
    return _Vector(weights, [math.sqrt(square) for square in squares], length)


def _similarity(ours: _Vector, gold: _Vector) -> float:
    """The mean over n of clipped cosines, less the penalty for another length."""
    products = [0.0] * MAX_NGRAM
    for ngram, weight in ours.weights.items():
        other = gold.weights.get(ngram, 0.0)
        products[len(ngram) - 1] += min(weight, other) * other
    cosines = (
        product / (ours_norm * gold_norm) if ours_norm and gold_norm else 0.0
        for product, ours_norm, gold_norm in zip(products, ours.norms, gold.norms, strict=True)
    )
    penalty = math.exp(-((ours.length - gold.length) ** 2) / (2 * CIDER_SIGMA**2))
    return penalty * sum(cosines) / MAX_NGRAM


# --- BLEU and ROUGE-L ---------------------------------------------------------------------------


def _bleu(captions: list[list[str]], golds: list[list[list[str]]]) -> list[float]:
    correct, guessed = [0] * MAX_NGRAM, [0] * MAX_NGRAM
    length = gold_length = 0
    for caption, group in zip(captions, golds, strict=True):
        most = Counts()
        for gold in group:
            most |= _ngrams(gold)
        for ngram, count in (_ngrams(caption) & most).items():
            correct[len(ngram) - 1] += count
        for n in range(MAX_NGRAM):
            guessed[n] += max(0, len(caption) - n)
        length += len(caption)
        # the reference nearest in length, the shorter of two equally near
        gold_length += min((abs(len(gold) - len(caption)), len(gold)) for gold in group)[1]
    ratio = (length + TINY) / (gold_length + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [penalty * score for score in _geometric_means(correct, guessed)]


def _geometric_means(correct: list[int], guessed: list[int]) -> Iterator[float]:
    product = 1.0
    for n, (right, total) in enumerate(zip(correct, guessed, strict=True), start=1):
        product *= (right + TINY) / (total + SMALL)
        yield product ** (1 / n)


def _rouge_l(text: str, golds: list[str]) -> float:
    words = text.split(" ")
    common = [(_common_length(words, gold.split(" ")), gold.split(" ")) for gold in golds]
    # the best precision and the best recall may come from two references
    precision = max(shared / len(words) for shared, _ in common)
    recall = max(shared / len(gold) for shared, gold in common)
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _common_length(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b, start=1):
            row.append(above[j - 1] + 1 if word == other else max(above[j], row[j - 1]))
    return row[-1]
