"""What lies in each cell of a collage: a list that teaches a small tower to see. Ours.

Captions alone teach shapes slowly; a list with one word a cell, and one cell an adapter query, is
the shortest way from the loss to the patches, as for drawn scenes (docs/decisions.md).
"""

from qwenvl_jax.data.sources.composition import Collage, Thing
from qwenvl_jax.data.sources.scene_language import NOTHING, in_cells

QUESTION = "What is in each cell?"
_COVERED = 0.15  # of a cell, by the box of the thing that it belongs to


def cell_things(collage: Collage) -> list[Thing | None]:
    """Returns the thing of each cell, row by row: whose box covers most of it, if enough."""
    return in_cells(collage.things, collage.side, _COVERED)


def cell_list(collage: Collage) -> str:
    """Returns one word a cell: the last of the thing's English noun, so that most are one token."""
    things = cell_things(collage)
    return " ".join(
        NOTHING if thing is None else thing.name.noun.en.split()[-1] for thing in things
    )
