"""How one released tensor becomes ours, and back: pure numpy, bit-exact both ways.

    D text width   N heads   H head dimension   E vision width   R pixels of one patch

PyTorch keeps matrices as [out, in]; ours are [in, out...] with heads as axes of their own. Going
in, every transform only re-reads the same memory (views), so it costs nothing until a slice of the
result is copied. Going out, the parts of a fused tensor are put together in one new array.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Arrays = tuple[np.ndarray, ...]


class Transform(NamedTuple):
    """Two functions that undo each other: released tensor -> our arrays -> released tensor."""

    to_ours: Callable[[np.ndarray], Arrays]
    to_released: Callable[[Arrays], np.ndarray]


def keep() -> Transform:
    """Returns the transform of tensors that are the same on both sides: norms, tables, `proj`."""
    return Transform(lambda tensor: (tensor,), lambda ours: ours[0])


def linear() -> Transform:
    """Returns the transform of a PyTorch matrix [out, in] <-> [in, out]."""
    return Transform(lambda tensor: (tensor.T,), lambda ours: ours[0].T)


def linear_from_heads(num_heads: int) -> Transform:
    """Returns the transform of an output projection [out, N*H] <-> [N, H, out]."""

    def to_ours(tensor: np.ndarray) -> Arrays:
        return (tensor.T.reshape(num_heads, -1, tensor.shape[0]),)

    def to_released(ours: Arrays) -> np.ndarray:
        return ours[0].reshape(-1, ours[0].shape[-1]).T

    return Transform(to_ours, to_released)


def fused_blocks(num_heads: int) -> Transform:
    """Returns the transform of a fused projection laid out [q; k; v], each of them [N*H, in].

    Weights [3*N*H, in] <-> three of [in, N, H]; biases [3*N*H] <-> three of [N, H].
    Source: `c_attn` of modeling_qwen.py, `in_proj_weight` of torch.nn.MultiheadAttention.
    """

    def to_ours(tensor: np.ndarray) -> Arrays:
        qkv = tensor.reshape(3, num_heads, -1, *tensor.shape[1:])
        return tuple(_input_axis_first(part) for part in qkv)

    def to_released(ours: Arrays) -> np.ndarray:
        qkv = np.stack([_input_axis_last(part) for part in ours])
        return qkv.reshape(-1, *qkv.shape[3:])

    return Transform(to_ours, to_released)


def fused_per_head(num_heads: int) -> Transform:
    """Returns the transform of a fused projection laid out head by head: (N, 3, H) rows.

    Shapes as in `fused_blocks`; only the order of the rows differs.
    Source: `in_proj` of VisualAttention in the released visual.py.
    """

    def to_ours(tensor: np.ndarray) -> Arrays:
        qkv = tensor.reshape(num_heads, 3, -1, *tensor.shape[1:])
        return tuple(_input_axis_first(qkv[:, part]) for part in range(3))

    def to_released(ours: Arrays) -> np.ndarray:
        qkv = np.stack([_input_axis_last(part) for part in ours], axis=1)
        return qkv.reshape(-1, *qkv.shape[3:])

    return Transform(to_ours, to_released)


def patch_convolution(patch_size: int) -> Transform:
    """Returns the transform of a patch convolution [E, channel, y, x] <-> matrix [R, E].

    R runs over patch row, patch column, channel: the order in which `vit` flattens its patches.
    """

    def to_ours(tensor: np.ndarray) -> Arrays:
        return (tensor.transpose(2, 3, 1, 0).reshape(-1, tensor.shape[0]),)

    def to_released(ours: Arrays) -> np.ndarray:
        width = ours[0].shape[-1]
        return ours[0].reshape(patch_size, patch_size, -1, width).transpose(3, 2, 0, 1)

    return Transform(to_ours, to_released)


def without_class_row() -> Transform:
    """Returns the transform of a position table whose first row belongs to a class token.

    That row is lost, so this is the one transform without a way back: OpenCLIP is import only.
    """

    def to_released(ours: Arrays) -> np.ndarray:
        raise NotImplementedError("a dropped class row cannot be made again: import only")

    return Transform(lambda tensor: (tensor[1:],), to_released)


def _input_axis_first(part: np.ndarray) -> np.ndarray:
    """Returns [in, N, H] for a weight [N, H, in]; a bias [N, H] as it is."""
    return part.transpose(2, 0, 1) if part.ndim == 3 else part


def _input_axis_last(part: np.ndarray) -> np.ndarray:
    return part.transpose(1, 2, 0) if part.ndim == 3 else part
