"""The loaded model that users hold: ids and pictures in, numbers and new ids out.

    vl = qwenvl_jax.from_pretrained("Qwen-VL-Chat")
    vl.generate(vl.tokenizer.encode("Once upon a time"), max_new_tokens=20)
    print(vl.chat("What is parked here? Give its box.", images=["street.jpg"]).text)

Axes: B rows  L text length with slots  I pictures  Y X C picture rows, columns, channels
      Q adapter queries  D text width  V vocabulary rows.
Every method checks its input on the host, rounds shapes up to a bucket, and calls one compiled
function. Text and turns are `session.py`; this file knows ids only.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qwenvl_jax.config import ConfigError, DType, ModelConfig
from qwenvl_jax.conversion.load import load_weights, read_config
from qwenvl_jax.inference import prompts as prompts_lib
from qwenvl_jax.inference import session
from qwenvl_jax.inference.cache import row_bucket
from qwenvl_jax.inference.errors import InputError, whole_number
from qwenvl_jax.inference.forward import Forward
from qwenvl_jax.inference.generate import Generator
from qwenvl_jax.inference.pictures import PictureFeatures
from qwenvl_jax.inference.prompts import LongContext, Prompts
from qwenvl_jax.inference.sampling import GREEDY, Sampling
from qwenvl_jax.inference.session import History, Pictures, Reply, TextStream
from qwenvl_jax.inference.shipped import SHIPPED_MODEL
from qwenvl_jax.model.attention import check_backend
from qwenvl_jax.model.qwenvl import abstract_state
from qwenvl_jax.prompt.tokenizer import Tokenizer, load_tokenizer
from qwenvl_jax.sharding import make_mesh, platform_of
from qwenvl_jax.words import counted

DTYPES = ("bfloat16", "float32")

Tokens = Sequence[int] | np.ndarray | jax.Array  # int [L]
Images = Sequence[np.ndarray] | np.ndarray | jax.Array | None  # uint8 [n, Y, X, 3]


def from_pretrained(
    path: str | Path | None = None,
    dtype: DType | None = None,
    mesh: Mesh | None = None,
) -> "VL":
    """Returns the model of a folder: a released PyTorch one, or one of ours.

    Without a path it is the small model that comes with the package. `dtype` is that of the weights
    and of the arithmetic; norms, softmax, rotary angles and logits are float32 either way. None is
    bfloat16, and float32 for the small model. `mesh` (see `sharding.make_mesh`) spreads the
    weights; None is the first device.

    Raises:
        InputError: there is no such dtype.
        ConfigError: its attention backend cannot compute on these devices.
        ConversionError, WeightsError, CheckpointError: the released folder, folder of ours or run
            cannot be used; says which file and why.
    """
    if dtype is None:
        dtype = "float32" if path is None else "bfloat16"
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {DTYPES}: got {dtype!r}")
    folder = SHIPPED_MODEL if path is None else Path(path)
    mesh = make_mesh() if mesh is None else mesh
    config = dataclasses.replace(read_config(folder), dtype=dtype, param_dtype=dtype)
    try:
        check_backend(config, platform_of(mesh))
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    graphdef, abstract = abstract_state(config, mesh)
    return VL(config, graphdef, load_weights(folder, abstract), mesh, folder)


class VL:
    """One model on one mesh. Thread-safe: nothing changes after it is made but a feature cache."""

    def __init__(
        self,
        config: ModelConfig,
        graphdef: nnx.GraphDef,
        state: nnx.State,
        mesh: Mesh,
        folder: Path | None = None,
    ):
        """`folder` is where the tokenizer file may be; it is read when first asked for."""
        self.config, self.mesh, self.folder = config, mesh, folder
        self._forward = Forward(config, graphdef, state, mesh)
        self._generator = Generator(config, graphdef, state, mesh)
        shape_QD = (config.adapter.num_queries, config.decoder.width)
        self._features = PictureFeatures(self._forward.encode, shape_QD)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights.

        Raises:
            TokenizerError: there is none, or it belongs to another model.
        """
        return load_tokenizer(
            self.folder or "", self.config.adapter.num_queries, self.config.image_start_id
        )

    def encode_images(self, images: Images) -> np.ndarray:
        """Returns what the adapter makes of uint8 pictures [n, Y, X, 3]: float32 [n, Q, D].

        Raises:
            InputError: see `prompts.check_images`.
        """
        checked = prompts_lib.check_images(images, self.config, "encode_images")
        return self._features(checked).astype(np.float32)  # bf16 is no NumPy citizen

    def logits(self, tokens: Tokens, images: Images = None, train: bool = False) -> np.ndarray:
        """Returns the scores of the next token at every position: float32 [L, V].

        `images` uint8 [n, Y, X, 3] in reading order, one for each `<img>` span of the tokens.
        `train=True` computes as in training: no NTK, no log-n scaling beyond the trained length.

        Raises:
            InputError: tokens and pictures that do not fit each other or the model.
        """
        prompts = self._lay_out([tokens], [images], [0], rows=1, names=["tokens"])
        return self._forward.logits(prompts, is_training=train)

    def generate(
        self,
        tokens: Tokens,
        images: Images = None,
        max_new_tokens: int = 512,
        temperature: float = GREEDY,
        *,
        stop_tokens: Sequence[int] = (),
        long_context: LongContext = "row",
        **sampling: Any,
    ) -> list[int]:
        """Returns the new tokens only.

        Ends after `max_new_tokens`, or before a token of `stop_tokens`, which is left out: an
        answer shorter than `max_new_tokens` was stopped. `sampling` takes the other fields of
        `sampling.Sampling`: top_k, top_p, repetition_penalty, seed. `long_context`: see
        `prompts.LongContext`.

            >>> vl.generate(ids, images, max_new_tokens=24)  # doctest: +SKIP

        Raises:
            InputError: tokens and pictures that do not fit each other or the model.
        """
        [answer] = self.generate_batch(
            [tokens],
            [images],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_tokens=stop_tokens,
            long_context=long_context,
            **sampling,
        )
        return answer

    def generate_batch(
        self,
        tokens: Sequence[Tokens],
        images: Sequence[Images] | None = None,
        *,
        max_new_tokens: int = 512,
        stop_tokens: Sequence[int] = (),
        long_context: LongContext = "row",
        seed: int = 0,
        **sampling: Any,
    ) -> list[list[int]]:
        """Returns the new tokens of each row; each row as if it were alone.

        Row b draws with `seed + b`. Other arguments as in `generate`; `images[b]` are the pictures
        of row b, or None.
        """
        if len(tokens) == 0:
            return []
        seed = whole_number("seed", seed)
        if 0 <= seed < 2**63 < seed + len(tokens):
            raise InputError(
                f"seed + rows must be at most 2**63, as row b draws with seed + b: got seed {seed} "
                f"and {counted(len(tokens), 'row')}; choose a smaller seed"
            )
        stop = prompts_lib.check_stop_tokens(stop_tokens, self.config)
        choices = [Sampling(seed=seed + b, **sampling) for b in range(len(tokens))]
        limits = [max_new_tokens] * len(tokens)
        prompts = self._batch(tokens, images, limits, long_context)
        if max_new_tokens == 0:
            return [[] for _ in tokens]
        return self._generator.run(prompts, choices, limits, [stop] * len(tokens))

    def stream(
        self,
        tokens: Tokens,
        images: Images = None,
        *,
        max_new_tokens: int = 512,
        stop_tokens: Sequence[int] = (),
        long_context: LongContext = "row",
        every: int = 4,
        **sampling: Any,
    ) -> Iterator[list[int]]:
        """Yields the tokens of `generate` as they come, about `every` at a time."""
        if whole_number("every", every) < 1:
            raise InputError(f"every must be 1 or more: got {every}")
        choice = Sampling(**sampling)
        stop = prompts_lib.check_stop_tokens(stop_tokens, self.config)
        prompts = self._batch([tokens], [images], [max_new_tokens], long_context)
        return self._stream(prompts, choice, max_new_tokens, stop, min(every, max_new_tokens))

    def _stream(
        self, prompts: Prompts, choice: Sampling, max_new: int, stop: tuple[int, ...], every: int
    ) -> Iterator[list[int]]:
        if max_new == 0:
            return
        num_sent = 0
        for [answer] in self._generator.stream(prompts, [choice], [max_new], [stop], every=every):
            if len(answer) > num_sent:
                yield answer[num_sent:]
                num_sent = len(answer)

    def chat(
        self,
        text: str,
        images: Pictures = None,
        history: History | None = None,
        **options: Any,
    ) -> Reply:
        """Returns the answer to one message, its boxes, and the history to pass next time.

        `images` are paths, bytes, PIL images or uint8 arrays, shown before the text; a single one
        needs no list. Options are the fields of `session.ChatOptions`: system, max_new_tokens,
        temperature, seed, live_tags...

            >>> reply = vl.chat("Where is the dog?", images=["park.jpg"])  # doctest: +SKIP
            >>> reply = vl.chat("And the cat?", history=reply.history)  # doctest: +SKIP
        """
        return self.chat_stream(text, images, history, **options).reply

    def chat_stream(
        self,
        text: str,
        images: Pictures = None,
        history: History | None = None,
        **options: Any,
    ) -> TextStream:
        """Returns an iterator over pieces of the answer's text; at its end `.reply` is whole."""
        return session.chat_stream(
            self, text, images, history or (), session.make_options(session.ChatOptions, options)
        )

    def complete(
        self, text: str, images: Pictures = None, raw: bool = False, **options: Any
    ) -> Reply:
        """Returns what follows pictures and text, as the base model was trained: no roles.

        Options are the fields of `session.TextOptions`; `raw` as in `session.complete_stream`.

            >>> vl.complete("Generate the caption in English:", ["park.jpg"])  # doctest: +SKIP
        """
        chosen = session.make_options(session.TextOptions, options)
        return session.complete_stream(self, text, images, chosen, raw=raw).reply

    def _batch(
        self,
        tokens: Sequence[Tokens],
        images: Sequence[Images] | None,
        limits: Sequence[int],
        long_context: LongContext,
    ) -> Prompts:
        images = [None] * len(tokens) if images is None else images
        if len(images) != len(tokens):
            raise InputError(
                f"one entry of images for each row of tokens: got {len(images)} for {len(tokens)}; "
                "a row without pictures has None"
            )
        names = ["tokens"] if len(tokens) == 1 else [f"row {b}" for b in range(len(tokens))]
        rows = row_bucket(len(tokens))
        return self._lay_out(
            tokens, images, limits, rows=rows, names=names, long_context=long_context
        )

    def _lay_out(
        self,
        tokens: Sequence[Tokens],
        images: Sequence[Images],
        limits: Sequence[int],
        *,
        rows: int,
        names: Sequence[str],
        long_context: LongContext = "row",
    ) -> Prompts:
        """Returns everything checked, pictures encoded, as one batch on the host."""
        config = self.config
        ids, pictures, starts = [], [], []
        for row, shown, limit, name in zip(tokens, images, limits, names, strict=True):
            ids.append(prompts_lib.check_ids(row, config, name))
            pictures.append(prompts_lib.check_images(shown, config, name))
            prompts_lib.check_length(len(ids[-1]), limit, config, name)
            starts.append(prompts_lib.find_pictures(ids[-1], len(pictures[-1]), config, name))
        features = self._features_of(pictures)
        return prompts_lib.lay_out(
            ids, starts, features, config, rows=rows, long_context=long_context
        )

    def _features_of(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns [n, Q, D] for each row; the tower sees the pictures of all rows together."""
        shown = [row for row in pictures if len(row)]
        sides = sorted({row.shape[1] for row in shown})
        if len(sides) > 1:
            raise InputError(
                f"pictures of one call must have the same side: got {sides}; resize them, or call "
                "once for each side"
            )
        together = self._features(np.concatenate(shown) if shown else pictures[0])
        ends = np.cumsum([len(row) for row in pictures])
        return np.split(together, ends[:-1])
