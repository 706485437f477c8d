"""A training sample as a question: the prompt before its first answer, and that answer."""

from typing import NamedTuple

import numpy as np

from qwenvl_jax.data.example import Example
from qwenvl_jax.prompt.tokenizer import Tokenizer


class Question(NamedTuple):
    """What a model is given, and what is right."""

    prompt: np.ndarray  # int32 [L]
    answer: list[int]  # without the token that ends it


def as_question(example: Example, tokenizer: Tokenizer) -> Question | None:
    """Returns the sample up to its first answer, and that answer, whatever its loss mask.

    None where nothing stands before it, or nothing is predicted.
    """
    first = _answer_start(example, tokenizer)
    if first == 0 or not example.is_target[first:].any():
        return None
    rest = example.is_target[first:]
    length = len(rest) if rest.all() else int(rest.argmin())
    answer = example.ids[first : first + length].tolist()
    ends = {tokenizer.endoftext_id, tokenizer.im_end_id}
    cut = next((i for i, token in enumerate(answer) if token in ends), length)
    return Question(example.ids[:first], answer[:cut])


def _answer_start(example: Example, tokenizer: Tokenizer) -> int:
    """Returns where the first answer begins: in a dialogue, whose markers are predicted as well,
    behind the assistant's; elsewhere at the first predicted token.
    """
    role = [tokenizer.im_start_id, *tokenizer.encode("assistant"), *tokenizer.encode("\n")]
    for begin in np.flatnonzero(example.ids == tokenizer.im_start_id).tolist():
        if example.ids[begin : begin + len(role)].tolist() == role:
            return begin + len(role)
    return int(example.is_target.argmax())
