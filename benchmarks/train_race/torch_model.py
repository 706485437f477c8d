"""The same model in PyTorch, written to be fast: SDPA attention, fused q/k/v and gate/up products.

It has the shapes of `qwenvl_jax.model` and is trained the same way; it is raced against, not used.

Axes: I pictures  P patches  E tower width  Q queries  B rows  L tokens  D width  V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from qwenvl_jax.config import DecoderConfig, ModelConfig, VisionConfig
from qwenvl_jax.data.example import Batch


def heads(x: Tensor, count: int) -> Tensor:
    """Returns [B, heads, L, width / heads]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class TowerBlock(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        E = config.width
        self.num_heads = config.num_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(E, eps=1e-6), nn.LayerNorm(E, eps=1e-6)
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.up, self.down = nn.Linear(E, config.mlp_dim), nn.Linear(config.mlp_dim, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(self.ln_1(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.ln_2(x))))


class DecoderBlock(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        D, inner = config.width, config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.ln_1, self.ln_2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)
        self.qkv, self.out = nn.Linear(D, 3 * inner), nn.Linear(inner, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * config.mlp_dim, bias=False)
        self.down = nn.Linear(config.mlp_dim, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (heads(part, self.num_heads) for part in self.qkv(self.ln_1(x)).chunk(3, -1))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.ln_2(x)).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, -1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.to(x.dtype)


class TorchQwenVL(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, V = config.vision.width, config.decoder.width, config.decoder.vocab_size
        Q, patch = config.adapter.num_queries, config.vision.patch_size
        self.num_heads = config.adapter.num_heads
        self.patch_embed = nn.Conv2d(3, E, patch, patch, bias=False)
        self.position_embed = nn.Parameter(torch.randn(config.vision.table_side**2, E) * 0.02)
        self.ln_pre = nn.LayerNorm(E, eps=1e-6)
        vision, decoder = config.vision, config.decoder
        self.tower = nn.ModuleList(TowerBlock(vision) for _ in range(vision.num_layers))
        self.query = nn.Parameter(torch.randn(Q, D) * 0.02)
        self.kv_proj = nn.Linear(E, D, bias=False)
        self.ln_q, self.ln_kv = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.ln_post, self.proj = nn.LayerNorm(D, eps=1e-6), nn.Linear(D, D, bias=False)
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(DecoderBlock(decoder) for _ in range(decoder.num_layers))
        self.ln_f, self.lm_head = nn.RMSNorm(D, eps=1e-6), nn.Linear(D, V, bias=False)
        angle = torch.outer(
            torch.arange(decoder.max_positions).float(),
            decoder.rope_base ** -(torch.arange(0, decoder.head_dim, 2) / decoder.head_dim),
        )
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def encode_images(self, pixels_ICYX: Tensor) -> Tensor:
        x_IPE = self.patch_embed(pixels_ICYX).flatten(2).transpose(1, 2)
        x_IPE = self.ln_pre(x_IPE + self.position_embed)
        for block in self.tower:
            x_IPE = block(x_IPE)
        kv_IPD = self.ln_kv(self.kv_proj(x_IPE))
        query = self.q(self.ln_q(self.query)).expand(len(kv_IPD), -1, -1)
        q, k, v = (heads(x, self.num_heads) for x in (query, self.k(kv_IPD), self.v(kv_IPD)))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(self.ln_post(self.o(attended.transpose(1, 2).flatten(2))))

    def forward(self, tokens_BL: Tensor, pixels_ICYX: Tensor, targets_BL: Tensor) -> Tensor:
        """Returns the mean loss over targets that are not -100; one picture a row, slots from 1."""
        visual_IQD = self.encode_images(pixels_ICYX)
        x_BLD = self.embed(tokens_BL)
        Q = visual_IQD.shape[1]
        x_BLD = torch.cat([x_BLD[:, :1], visual_IQD.to(x_BLD.dtype), x_BLD[:, Q + 1 :]], 1)
        cos, sin = self.cos[: x_BLD.shape[1]], self.sin[: x_BLD.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD, cos, sin)
        logits_BLV = self.lm_head(self.ln_f(x_BLD))
        return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (tokens, normalised pixels, targets) of a batch for `TorchQwenVL.forward`."""
    targets = torch.from_numpy(batch.targets).long()
    targets[torch.from_numpy(batch.loss_weight) == 0] = -100
    pixels = torch.from_numpy(batch.images[:, 0]).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return torch.from_numpy(batch.tokens).long(), pixels, targets
