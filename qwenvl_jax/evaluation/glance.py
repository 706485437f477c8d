"""A glance at a model while it trains: its answers to held-out samples, drawn on their pictures.

Axes: B samples  L prompt length, padded  Y X C picture rows, columns, channels  T answer slots.

A sample of any task and source is asked as it is trained on: the prompt is what stands before its
first answer, and the tokens that are predicted from there are what is right. All samples go through
one compiled program, on the mesh of the run and with its weights where they lie.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwenvl_jax.config import ModelConfig, TrainConfig
from qwenvl_jax.data.example import Example
from qwenvl_jax.data.holes import Hole
from qwenvl_jax.data.packing import pixels
from qwenvl_jax.data.pipeline import draw
from qwenvl_jax.data.rows import open_sources, read_sample
from qwenvl_jax.evaluation.marks import HIT_IOU, place_iou
from qwenvl_jax.evaluation.questions import Question, as_question
from qwenvl_jax.evaluation.sheet import Exchange, Sitting, draw_sheet
from qwenvl_jax.inference.generate import Request, decode, place, start
from qwenvl_jax.inference.prompts import Prompts, find_pictures, lay_out
from qwenvl_jax.inference.sampling import Sampling, host_array, stack
from qwenvl_jax.prompt.boxes import parse_boxes, strip_boxes
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer
from qwenvl_jax.training.heldout import HeldOut, held_out
from qwenvl_jax.training.state import Layout, Weights, merge_model
from qwenvl_jax.words import counted

_LOOKED_AT = 16  # samples for each one that is shown, so that many tasks are found among them


class Asked(NamedTuple):
    """A held-out sample with one picture, as a question."""

    example: Example
    question: Question


class AnswerPage:
    """Draws the answers to the same held-out samples at every call."""

    def __init__(self, config: TrainConfig, layout: Layout):
        """Chooses the samples.

        Raises: ConfigError where the run has no held-out data, DataError where they are unusable.
        """
        slots = config.model.adapter.num_queries
        self._config, self._layout = config, layout
        self._tokenizer = load_tokenizer(config.data.tokenizer, slots=slots)
        held = held_out(config)
        found = samples(held, self._tokenizer, config.seed)
        self._asked = choose(found, config, self._tokenizer)
        size = held.data.image_size
        self._images = [pixels(x.example, x.example.images[0], size) for x in self._asked]
        replicated = NamedSharding(layout.mesh, PartitionSpec())
        self._answer = jax.jit(self._answers, out_shardings=replicated)

    def __call__(self, weights: Weights) -> np.ndarray | None:
        """Returns the page, uint8 [Y, X, 3]; None where no sample has a picture."""
        if not self._asked:
            return None
        count = len(self._asked)
        prompts = _lay_out(self._asked, self._config.model)
        stop = (self._tokenizer.endoftext_id, self._tokenizer.im_end_id)
        request = Request(
            sampling=stack([Sampling()] * count),
            max_new_B=host_array([self._config.evaluation.max_new_tokens] * count, np.int32),
            stop_BX=host_array([stop] * count, np.int32),
        )
        inputs = place((np.stack(self._images), prompts, request), self._layout.mesh)
        answer_BT, count_B = jax.device_get(self._answer(weights, *inputs))
        answers = [answer_BT[b, : count_B[b]].tolist() for b in range(count)]
        sittings = [
            Sitting(image, [exchange(asked, ids, self._tokenizer)])
            for image, asked, ids in zip(self._images, self._asked, answers, strict=True)
        ]
        right = sum(sitting.exchanges[0].is_right for sitting in sittings)
        title = (
            f"{self._config.run_dir}: {right} of {counted(len(sittings), 'held-out sample')} right"
        )
        return np.asarray(draw_sheet(title, sittings))

    def _answers(
        self, weights: Weights, image_BYXC: jax.Array, prompts: Prompts, request: Request
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (answers [B, T], how many of their tokens count [B])."""
        config, layout = self._config, self._layout
        model = merge_model(layout.graphdef, weights)
        prompts = prompts._replace(visual_BIQD=model.encode_images(image_BYXC)[:, None])
        graphdef, state = nnx.split(model)
        fixed = (graphdef, config.model, layout.mesh, state)
        most = config.evaluation.max_new_tokens
        decoding = start(*fixed, prompts, request, answer_slots=most)
        decoding = decode(*fixed, request, decoding=decoding, until=jnp.int32(most))
        return decoding.answer_BT, decoding.count_B


def samples(held: HeldOut, tokenizer: Tokenizer, seed: int) -> Iterator[Example]:
    """Yields held-out samples in a fixed order; rows that cannot be used are passed over."""
    data = held.data
    if data.source != "rows":
        for number in itertools.count():
            yield draw(data, tokenizer, seed, held.split, 0, number)
    for name, source in open_sources(data, tokenizer).items():
        for index in range(len(source)):
            sample = read_sample(source, name, index, tokenizer, data)
            if not isinstance(sample, Hole):
                yield sample


def choose(found: Iterator[Example], config: TrainConfig, tokenizer: Tokenizer) -> list[Asked]:
    """Returns the first samples with one picture, as many of each task as there can be."""
    count = config.evaluation.samples
    by_task: dict[str, list[Asked]] = {}
    for example in itertools.islice(found, _LOOKED_AT * count):
        question = as_question(example, tokenizer)
        room = config.model.decoder.max_positions - config.evaluation.max_new_tokens
        if len(example.images) == 1 and question is not None and len(question.prompt) <= room:
            by_task.setdefault(example.task, []).append(Asked(example, question))
    in_turn = itertools.chain.from_iterable(itertools.zip_longest(*by_task.values()))
    return [asked for asked in in_turn if asked is not None][:count]


def exchange(asked: Asked, answer: list[int], tokenizer: Tokenizer) -> Exchange:
    """Returns question and answer as the sheet shows them."""
    said, expected = tokenizer.decode(answer), tokenizer.decode(asked.question.answer)
    return Exchange(
        asked=f"{asked.example.task}: {_question(asked.question.prompt, tokenizer)}",
        answer=said,
        is_right=agrees(said, expected),
        expected=expected,
    )


def agrees(answer: str, expected: str) -> bool:
    """Returns whether an answer says the same, with as many places, each at an IoU of 0.5."""
    ours, theirs = parse_boxes(answer), parse_boxes(expected)
    is_same_text = strip_boxes(answer).strip() == strip_boxes(expected).strip()
    return (
        is_same_text
        and len(ours) == len(theirs)
        and all(place_iou(a, b) >= HIT_IOU for a, b in zip(ours, theirs, strict=True))
    )


def _question(prompt: np.ndarray, tokenizer: Tokenizer) -> str:
    """Returns what was asked, for people: of a dialogue the user's turn alone."""
    turns = np.flatnonzero(prompt == tokenizer.im_start_id)
    if len(turns) >= 2:  # the last one opens the answer
        prompt = prompt[turns[-2] : turns[-1]]
    text = tokenizer.decode(prompt, skip_special=True).strip()
    return text.removeprefix("user\n").removeprefix("Picture 1:").strip()


def _lay_out(asked: list[Asked], model: ModelConfig) -> Prompts:
    """Returns the prompts as one batch, the pictures' features still to come."""
    shape_QD = (model.adapter.num_queries, model.decoder.width)
    ids = [x.question.prompt for x in asked]
    starts = [find_pictures(x, 1, model, f"sample {b}") for b, x in enumerate(ids)]
    features = [np.zeros((1, *shape_QD), np.float32)] * len(asked)
    prompts = lay_out(ids, starts, features, model, rows=len(asked))
    return prompts._replace(visual_BIQD=None)
