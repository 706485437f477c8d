"""Text and places to ids and back: tokenizer, ChatML, boxes and drawing. No jax in this room."""

from qwenvl_jax.prompt.boxes import parse_boxes, strip_boxes
from qwenvl_jax.prompt.chat import Message, Picture, Region, render_example, render_prompt
from qwenvl_jax.prompt.list_format import from_list_format, to_list_format
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer
from qwenvl_jax.prompt.vocabulary import TokenizerError

__all__ = [
    "Message",
    "Picture",
    "Region",
    "Tokenizer",
    "TokenizerError",
    "from_list_format",
    "load_tokenizer",
    "parse_boxes",
    "render_example",
    "render_prompt",
    "strip_boxes",
    "to_list_format",
]
