"""Words of the lines that a person reads."""


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, in the singular for one.

    >>> counted(1, "row"), counted(2000, "row"), counted(2, "micro-batch")
    ('1 row', '2,000 rows', '2 micro-batches')
    """
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number:,} {noun}{ending}"
