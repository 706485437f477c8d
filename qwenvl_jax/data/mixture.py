"""How many samples of each source a round of the mixture takes.

A round is what repeats: the data order counts rounds, and packing plans one of them. Of a single
source it is an epoch. Sources of a mixture are walked at their own speed, so a round may take part
of one and all of another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from qwenvl_jax.config import Mixing

# Samples of stage 2 by task. Source: paper Table 3.
STAGE_2_SAMPLES = {
    "caption": 19.7e6,
    "vqa": 3.6e6,
    "grounded_caption": 3.5e6,
    "ref_grounding": 8.7e6,
    "grounded_captioning": 8.7e6,
    "ocr": 24.8e6,
    "text": 7.8e6,
}
# Packing finds too few partners among fewer samples; small sources are passed more than once then.
MIN_ROUND = 1024


class Round(NamedTuple):
    """What repeats of finite data: so many packed rows, which hold each source so many times."""

    num_rows: int
    passes: dict[str, float]


def samples_per_round(
    sizes: Sequence[int], weights: Sequence[float], mixing: Mixing, temperature: float
) -> list[int]:
    """Returns how many samples a round takes of each source; `sizes` are its usable samples.

    counts: `weights` themselves, rounded; a source that has fewer is passed more than once.
    weights: shares of the samples as `weights` say, in a round that passes the source that is used
    up first once (or so often that the round has `MIN_ROUND` samples).
    temperature: as weights, with shares (size x weight) ** (1 / temperature): 1 is in proportion to
    the sizes, more draws the shares together.

        >>> samples_per_round([10_000, 90_000], [1.0, 1.0], "weights", 1.0)
        [10000, 10000]
    """
    if mixing == "counts":
        return [max(1, round(weight)) for weight in weights]
    shares = list(weights)
    if mixing == "temperature":
        pairs = zip(sizes, weights, strict=True)
        shares = [(size * weight) ** (1 / temperature) for size, weight in pairs]
    passes = [share / size for share, size in zip(shares, sizes, strict=True)]
    first = passes.index(max(passes))
    scale = sizes[first] / shares[first]
    if len(sizes) > 1 and (total := scale * sum(shares)) < MIN_ROUND:
        scale *= -(-MIN_ROUND // total)
    return [max(1, round(scale * share)) for share in shares]
