"""Pictures to adapter features, each different picture once.

Axes: I pictures  Y X C picture rows, columns, channels  Q adapter queries  D text width.
Features are kept by the digest of the pixels, so a second turn about the same picture does not run
the tower again. They are kept on the host: a few megabytes that cross to the device with the next
prompt, where the tower would cost teraflops.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from qwenvl_jax.inference.cache import bucket

MAX_AT_ONCE = 8  # pictures in one call of the tower: bounds its memory, whatever is asked for


class PictureFeatures:
    """Features by picture content; beyond `max_kept` pictures the longest unused are dropped."""

    def __init__(
        self,
        encode: Callable[[np.ndarray], np.ndarray],
        shape_QD: tuple[int, int],
        max_kept: int = 64,
    ):
        """`encode` makes [I, Q, D] of uint8 [I, Y, X, 3]."""
        self._encode = encode
        self._shape_QD = shape_QD
        self._max_kept = max_kept
        self._kept: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, image_IYXC: np.ndarray) -> np.ndarray:
        """Returns the features [I, Q, D] of uint8 pictures of one size."""
        if len(image_IYXC) == 0:
            return np.zeros((0, *self._shape_QD), np.float32)
        keys = [_digest(image) for image in image_IYXC]
        found = {}
        with self._lock:
            for key in keys:
                if key in self._kept:
                    self._kept.move_to_end(key)
                    found[key] = self._kept[key]
        missing = {key: i for i, key in enumerate(keys) if key not in found}
        fresh = self._encode_all(image_IYXC[list(missing.values())])
        found.update(zip(missing, fresh, strict=True))
        with self._lock:
            # Copies: a view would keep the features of its whole batch.
            self._kept.update((key, found[key].copy()) for key in missing)
            while len(self._kept) > self._max_kept:
                self._kept.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def _encode_all(self, image_IYXC: np.ndarray) -> list[np.ndarray]:
        features = []
        for first in range(0, len(image_IYXC), MAX_AT_ONCE):
            part = image_IYXC[first : first + MAX_AT_ONCE]
            padding = bucket(len(part), 1) - len(part)
            padded = np.pad(part, [(0, padding), (0, 0), (0, 0), (0, 0)])
            features.extend(self._encode(padded)[: len(part)])
        return features


def _digest(image_YXC: np.ndarray) -> bytes:
    shape = np.array(image_YXC.shape, np.int64).tobytes()
    return hashlib.blake2b(shape + image_YXC.tobytes(), digest_size=16).digest()
