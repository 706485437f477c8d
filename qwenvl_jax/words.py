"""Words of the lines that a person reads."""

import difflib
from collections.abc import Iterable


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the singular for one.

    >>> counted(1, "row"), counted(2000, "row"), counted(2, "micro-batch")
    ('1 row', '2,000 rows', '2 micro-batches')
    """
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"


def did_you_mean(got: str, names: Iterable[str]) -> str:
    """Returns the end of an error about a name that nothing has: the nearest, if one is near.

    >>> did_you_mean("captoin", ("caption", "vqa")), did_you_mean("x", ("caption", "vqa"))
    ("; did you mean 'caption'?", '')
    """
    near = difflib.get_close_matches(got, [*names], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
