"""Qwen-VL: how a picture becomes part of a sentence. Read this file first.

    pictures uint8 [I, Y, X, C] -> vit -> patches [I, P, E] -> adapter -> embeddings [I, Q, D]
    tokens [B, L] -> embedding table -> [B, L, D]
    merge: the Q slots behind each `<img>` take that picture's Q embeddings
    -> decoder (causal) -> hidden [B, L, D] -> head -> logits [B, L, V]

Axes: I pictures  Y X C pixels  P patches  E tower width  Q queries  B rows  L tokens  D width
V vocabulary  S cached slots.

In the tokens every slot holds the same id; what it stands for is said by `image_start` and by the
order of the pictures. Source: paper 2.1 to 2.3, released `modeling_qwen.py`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from qwenvl_jax.config import ModelConfig
from qwenvl_jax.model.adapter import Adapter
from qwenvl_jax.model.attention import Backend
from qwenvl_jax.model.decoder import Decoder, KVCache
from qwenvl_jax.model.lora import add_lora
from qwenvl_jax.model.products import logits
from qwenvl_jax.model.vit import ViT
from qwenvl_jax.sharding import fill, named_arrays, with_shardings


def merge_images(
    x_BLD: Float[Array, "B L D"],
    visual_BIQD: Float[Array, "B I Q D"],
    image_start_BI: Int[Array, "B I"],
) -> Float[Array, "B L D"]:
    """Returns the embeddings with each picture's Q vectors at [start, start + Q) of its row.

    A comparison finds each position's picture and offset, a gather fetches the vector, a where puts
    it in: no scatter, which is slow or broken on some accelerators, and nothing crosses rows, so a
    sharded batch stays local.
    """
    B, L, D = x_BLD.shape
    I, Q = visual_BIQD.shape[1:3]
    offset_BLI = jnp.arange(L)[None, :, None] - image_start_BI[:, None, :]
    is_inside_BLI = (offset_BLI >= 0) & (offset_BLI < Q)
    index_BLI = jnp.arange(I) * Q + offset_BLI
    index_BL = jnp.where(is_inside_BLI, index_BLI, 0).sum(axis=-1)
    flat = visual_BIQD.reshape(B, I * Q, D).astype(x_BLD.dtype)
    gathered_BLD = jnp.take_along_axis(flat, index_BL[..., None], axis=1)
    return jnp.where(is_inside_BLI.any(axis=-1)[..., None], gathered_BLD, x_BLD)


class QwenVL(nnx.Module):
    """The whole model. Weights only: every call is a pure function of its arguments."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.vit = ViT(config.vision, config.param_dtype, rngs=rngs)
        self.adapter = Adapter(
            config.adapter,
            config.vision.width,
            config.decoder.width,
            config.param_dtype,
            rngs=rngs,
        )
        self.decoder = Decoder(config.decoder, config.param_dtype, rngs=rngs)
        add_lora(self, config.lora, config.param_dtype, rngs)

    def encode_images(self, image_IYXC: UInt8[Array, "I Y X C"]) -> Float[Array, "I Q D"]:
        """Returns what replaces the slots of each picture, in the compute dtype."""
        config = self.config
        backend = Backend(config.attention_backend, config.attention_block)
        x_IPE = self.vit(
            image_IYXC, dtype=config.dtype, backend=backend, remat=config.vit_remat or config.remat
        )
        return self.adapter(x_IPE, backend=backend)

    def __call__(
        self,
        tokens_BL: Int[Array, "B L"],
        *,
        visual_BIQD: Float[Array, "B I Q D"] | None = None,
        image_start_BI: Int[Array, "B I"] | None = None,
        position_BL: Int[Array, "B L"] | None = None,
        segment_BL: Int[Array, "B L"] | None = None,
        ntk_alpha_B: Float[Array, "B"] | None = None,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B L D"], KVCache | None]:
        """Returns hidden states after the last norm, and the filled cache if one was given.

        Args:
            image_start_BI: index of each picture's first slot, the token after `<img>`.
            position_BL: counts from 0 within each segment; default one segment a row.
            segment_BL: samples packed in a row, from 1; 0 is padding.
            ntk_alpha_B: None computes as in training. A value a row (see `decoder.ntk_alpha`)
                computes as in inference: rotary base scaled, log-n beyond the trained length.

        Raises:
            ValueError: pictures without their places, or places without pictures.
        """
        if (visual_BIQD is None) != (image_start_BI is None):
            missing = "visual_BIQD" if visual_BIQD is None else "image_start_BI"
            raise ValueError(f"visual_BIQD and image_start_BI go together: got no {missing}")
        config = self.config
        x_BLD = self.decoder.embed_tokens(tokens_BL, config.dtype)
        if visual_BIQD is not None and image_start_BI is not None:
            x_BLD = merge_images(x_BLD, visual_BIQD, image_start_BI)
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if segment_BL is None:
            segment_BL = jnp.ones_like(tokens_BL)
        return self.decoder(
            x_BLD,
            position_BL,
            segment_BL,
            ntk_alpha_B=ntk_alpha_B,
            cache=cache,
            backend=Backend(config.attention_backend, config.attention_block),
            remat=config.remat,
        )

    def logits(self, hidden_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Returns float32 scores of every vocabulary row."""
        kernel_DV = self.decoder.lm_head.kernel[...].astype(hidden_BLD.dtype)
        return logits(hidden_BLD, kernel_DV)


def abstract_state(config: ModelConfig, mesh: Mesh | None = None) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the model's structure and its shapes, without any memory.

    With a mesh the shapes carry their shardings. Init, restore, conversion and planning all build
    on this one tree.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: QwenVL(config, rngs=nnx.Rngs(0))))
    return graphdef, state if mesh is None else with_shardings(state, mesh)


def draw_state(config: ModelConfig, key: Array, abstract: nnx.State) -> nnx.State:
    """Returns random weights for an abstract state, or a part of one, with its dtypes.

    Each is born on the devices where it will live.
    """
    wanted = named_arrays(abstract)

    @jax.jit(out_shardings={path: x.sharding for path, x in wanted.items()})
    def draw(key: Array) -> dict[str, Array]:
        made = named_arrays(nnx.state(QwenVL(config, rngs=nnx.Rngs(params=key))))
        return {path: made[path].astype(x.dtype) for path, x in wanted.items()}

    return fill(abstract, draw(key))
