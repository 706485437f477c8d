"""Greedy answers to many prompts, in batches of like length."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

if TYPE_CHECKING:
    from qwenvl_jax.inference.vl import VL

BATCH_ROWS = 64


@runtime_checkable
class Prompt(Protocol):
    """What is asked: ids, exactly as in training, and pictures, uint8 [I, Y, X, 3]."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def images_IYXC(self) -> np.ndarray: ...


def answers_to(
    vl: "VL",
    prompts: Sequence[Prompt],
    limits: Sequence[int],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Returns the model's greedy answer to each prompt, as text with its tags.

    `limits` says how many tokens each may have. Prompts of one limit go through the model
    together; `on_progress` hears how many are done.

    Raises: InputError for a prompt that is too long for the model.
    """
    tokenizer = vl.tokenizer
    stop = (tokenizer.endoftext_id, tokenizer.im_end_id)
    # rows of a batch pad to the longest
    order = sorted(range(len(prompts)), key=lambda i: (limits[i], len(prompts[i].tokens)))
    answers, done = [""] * len(prompts), 0
    for limit in sorted(set(limits)):
        chosen = [i for i in order if limits[i] == limit]
        for start in range(0, len(chosen), BATCH_ROWS):
            batch = chosen[start : start + BATCH_ROWS]
            replies = vl.generate_batch(
                [prompts[i].tokens for i in batch],
                [prompts[i].images_IYXC for i in batch],
                max_new_tokens=limit,
                stop_tokens=stop,
            )
            for i, ids in zip(batch, replies, strict=True):
                answers[i] = tokenizer.decode(ids)
            done += len(batch)
            on_progress(done)
    return answers
