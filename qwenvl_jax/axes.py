"""The one key of axis letters, and the logical names of parameter axes.

Arrays carry their axes as a suffix: `q_BLNH`, `image_IYXC`. A suffix is meaning, not placement.

    B batch rows           L text length, picture slots included     S cached length
    D text width           F text MLP width                          V vocabulary rows
    N heads                H head dimension                          K stacked layers
    I pictures             Y X C picture rows, columns, channels     P patches
    E vision width         M vision MLP width                        Q adapter queries
    R pixels of one patch, all channels (patch * patch * 3)
    T queries of one attention call, when they are not L

The logical names below label parameter axes. `sharding.py` maps each of them to mesh axes, and
nothing else in the package decides where a parameter lives.
"""

LAYERS = "layers"  # K: one slice a block, walked by jax.lax.scan

EMBED = "embed"  # D
MLP = "mlp"  # F
VOCAB = "vocab"  # V
HEADS = "heads"  # N of the decoder and of the adapter
HEAD_DIM = "head_dim"  # H
EMBED_OUT = "embed_out"  # D again, where a square matrix has D on both sides

PATCH = "patch"  # R
VIT_POSITION = "vit_position"  # rows of the stored position table
VIT_EMBED = "vit_embed"  # E
VIT_HEADS = "vit_heads"  # N of the tower
VIT_MLP = "vit_mlp"  # M
QUERY = "query"  # Q
RANK = "rank"  # between the two matrices of a LoRA pair

BATCH = "batch"  # B and I: rows and pictures of a step
COPIES = "copies"  # B where the mesh splits D instead: rows of one copy of the parameters
