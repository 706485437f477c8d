"""Qwen-VL in JAX: pictures and text in, text and boxes out.

    import qwenvl_jax

    vl = qwenvl_jax.from_pretrained("Qwen-VL-Chat")
    reply = vl.chat("What is on the table? Give boxes.", images=["kitchen.jpg"])
    print(reply.text, reply.boxes)

The names below are imported when first used, so that importing the package is quick and starts no
accelerator.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenvl_jax import evaluation
    from qwenvl_jax.image.load import load_image
    from qwenvl_jax.inference.vl import VL, from_pretrained
    from qwenvl_jax.prompt.boxes import parse_boxes
    from qwenvl_jax.prompt.tokenizer import load_tokenizer

__all__ = ["VL", "evaluation", "from_pretrained", "load_image", "load_tokenizer", "parse_boxes"]

_HOMES = {
    "VL": "qwenvl_jax.inference.vl",
    "from_pretrained": "qwenvl_jax.inference.vl",
    "load_image": "qwenvl_jax.image.load",
    "load_tokenizer": "qwenvl_jax.prompt.tokenizer",
    "parse_boxes": "qwenvl_jax.prompt.boxes",
}


def __getattr__(name: str) -> Any:
    if name == "evaluation":
        importlib.import_module("qwenvl_jax.evaluation.metrics")
        return importlib.import_module("qwenvl_jax.evaluation")
    if name == "__version__":
        return importlib.metadata.version("qwenvl-jax")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'qwenvl_jax' has no attribute {name!r}: it has {__all__}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
