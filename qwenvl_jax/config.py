"""Every setting of the system, as frozen keyword-only dataclasses.

Sizes have no defaults: a config that forgets one does not build. `configs/*.py` hold plain Python
functions `get_config()` that return a `TrainConfig`; `qwenvl_jax.cli` turns the fields into
`--a.b=c` options. Values are checked where they are made (`__post_init__`), so a wrong one fails
before any array exists.
"""

import dataclasses
import math
from typing import Any, Literal

from qwenvl_jax.checks import (
    ConfigError,
    Settings,
    below_one,
    multiple,
    not_negative,
    positive,
    share,
    unused,
)

AttentionBackend = Literal["auto", "xla", "xla_chunked", "splash", "cudnn"]
RematPolicy = Literal["none", "weights", "dots", "full"]
DType = Literal["float32", "bfloat16"]
Mixing = Literal["counts", "weights", "temperature"]
LossMask = Literal["released", "assistant_only"]
NO_IMAGE = 2**30  # where an unused picture slot of a row starts: past every real position


# --- model --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(Settings):
    """The tower: OpenCLIP ViT without class token (paper 2.1; released `visual.py`)."""

    width: int  # E
    num_layers: int
    num_heads: int
    mlp_dim: int  # M
    patch_size: int  # side in pixels
    table_side: int  # the stored position table is table_side x table_side
    norm_eps: float = 1e-6
    attention: Literal["global", "window"] = "global"
    window_side: int = 16  # patches on a side of one window; `window` only (paper E.3)
    global_every: int = 4  # one block in so many sees everything; `window` only

    def __post_init__(self):
        super().__post_init__()
        positive(self, "width", "num_layers", "num_heads", "mlp_dim", "patch_size", "table_side")
        positive(self, "window_side", "global_every", "norm_eps")
        multiple("VisionConfig.width", self.width, "num_heads", self.num_heads)
        if self.attention == "global":
            windows = ("window_side", "global_every")
            unused(self, "VisionConfig", windows, "attention='global'; set attention='window'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(Settings):
    """One cross-attention from learned queries to patches (paper 2.1)."""

    num_queries: int  # Q, a square number: queries sit on a grid
    num_heads: int
    norm_eps: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        positive(self, "num_queries", "num_heads", "norm_eps")
        side = round(self.num_queries**0.5)
        if side * side != self.num_queries:
            raise ConfigError(
                "AdapterConfig.num_queries must be a square number, because the queries carry "
                f"positions on a grid: got {self.num_queries}, nearest {side * side}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Settings):
    """The language model: Qwen-7B (paper 2.1; released `modeling_qwen.py`)."""

    width: int  # D
    num_layers: int
    num_heads: int
    head_dim: int
    mlp_dim: int  # F, one half of the released `intermediate_size`
    vocab_size: int  # V, rows of the embedding; the tokenizer may use fewer
    seq_length: int  # trained length: beyond it NTK and log-n scaling act, in inference only
    max_positions: int  # the longest sequence that is accepted
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    use_dynamic_ntk: bool = True
    use_logn: bool = True

    def __post_init__(self):
        super().__post_init__()
        positive(self, "width", "num_layers", "num_heads", "head_dim", "mlp_dim", "vocab_size")
        positive(self, "seq_length", "max_positions", "rope_base", "norm_eps")
        if self.head_dim % 2:
            raise ConfigError(f"DecoderConfig.head_dim must be even: got {self.head_dim}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(Settings):
    """Pairs of thin matrices beside frozen kernels, trained in their place (arXiv 2106.09685)."""

    rank: int = 0  # 0: there are none
    alpha: float = 16.0  # their product counts alpha / rank
    targets: tuple[str, ...] = ()  # shell patterns over matrices: "decoder.blocks.attn.*"
    dropout: float = 0.0  # share of a pair's input that a training step leaves out

    def __post_init__(self):
        super().__post_init__()
        positive(self, "alpha")
        below_one(self, "dropout")
        if self.rank < 0 or (self.rank > 0) != bool(self.targets):
            raise ConfigError(
                "LoraConfig must have a rank of 0 and no more, or a positive one and targets: got "
                f"rank={self.rank}, targets={self.targets}"
            )
        if not self.rank:
            unused(self, "LoraConfig", ("alpha", "dropout"), "rank=0; set rank and targets")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """The whole model's sizes, and how it computes."""

    vision: VisionConfig
    adapter: AdapterConfig
    decoder: DecoderConfig
    image_size: int  # side in pixels that pictures are resized to unless the caller says otherwise
    image_start_id: int  # `<img>`; `</img>` and `<imgpad>` are the next two ids
    dtype: DType = "float32"  # of activations and matrix products
    param_dtype: DType = "float32"  # of the weights
    attention_backend: AttentionBackend = "xla"  # "auto": splash on TPU, xla_chunked elsewhere
    attention_block: int = 512  # queries and keys that the splash kernel works on at once
    remat: RematPolicy = "none"  # "none" keeps all for the backward pass, "full" recomputes it
    vit_remat: RematPolicy | None = None  # of the tower; None: as `remat`
    lora: LoraConfig = LoraConfig()

    def __post_init__(self):
        super().__post_init__()
        positive(self, "image_size", "attention_block")
        multiple("ModelConfig.attention_block", self.attention_block, "the lanes of a TPU", 128)
        if self.attention_backend not in ("auto", "splash"):
            other = f"attention_backend={self.attention_backend!r}; set 'auto' or 'splash'"
            unused(self, "ModelConfig", ["attention_block"], other)
        if self.adapter.num_queries > self.decoder.max_positions - 2:
            raise ConfigError(
                "adapter.num_queries, and two, must not exceed decoder.max_positions: got "
                f"{self.adapter.num_queries} and {self.decoder.max_positions}"
            )
        patch, heads = self.vision.patch_size, self.adapter.num_heads
        multiple("ModelConfig.image_size", self.image_size, "vision.patch_size", patch)
        multiple("decoder.width", self.decoder.width, "adapter.num_heads", heads)
        if not 0 <= self.image_start_id < self.decoder.vocab_size - 2:
            raise ConfigError(
                "ModelConfig.image_start_id must leave room for </img> and <imgpad> in the "
                f"vocabulary: got {self.image_start_id} of {self.decoder.vocab_size} rows"
            )

    @property
    def image_end_id(self) -> int:
        return self.image_start_id + 1

    @property
    def image_pad_id(self) -> int:
        return self.image_start_id + 2


# --- training -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Settings):
    """What a training row is made of."""

    source: str  # "scenes"; "text": the same without pictures; "rows": `path` or `mixture`
    length: int  # L, tokens of a packed row
    max_images: int  # picture slots of one row
    image_size: int  # side in pixels
    rows: int  # B: packed rows of a step, over all devices
    tokenizer: str  # a qwen.tiktoken file or a folder that holds one; "": the run's `init`
    num_workers: int = 0  # processes that make batches; 0: threads of this one
    attend_across: bool = False  # samples of a row see those before them, as examples

    # of generated scenes
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)  # name -> sampling weight

    # of rows
    path: str = ""  # a conversation file, a prepared folder or a TFDS folder
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)  # such path -> its weight
    mixing: Mixing = "weights"  # what the weights of the mixture are; see `data/mixture.py`
    temperature: float = 1.0  # of mixing="temperature": more draws the shares together
    mask: LossMask = "released"  # assistant_only: no loss on the markers of other turns
    cut_turns: bool = False  # a dialogue longer than a row loses its last turns, else it is refused
    same_task_rows: bool = False  # a row holds samples of one task
    vary_pictures: float = 0.0  # brightness, contrast and colour, each by up to this share
    max_bad_fraction: float = 0.001  # of the samples that may be unusable before the run stops

    def __post_init__(self):
        super().__post_init__()
        positive(self, "length", "image_size", "rows", "temperature")
        not_negative(self, "num_workers", "max_images")
        for name in ("tasks", "mixture"):
            weights = getattr(self, name)
            if any(not 0 < weight < math.inf for weight in weights.values()):
                raise ConfigError(f"DataConfig.{name} must have positive weights: got {weights}")
        share(self, "max_bad_fraction", "vary_pictures")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Settings):
    """AdamW with linear warm-up and cosine decay (paper Table 8); weight decay is a row's."""

    peak_lr: float  # learning rate at the end of the warm-up
    end_lr: float  # where the cosine ends, one step after the last
    warmup_steps: int  # up to `peak_lr`, the first step's rate is 0; fewer than `steps`
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 1.0  # a longer gradient is scaled down to this

    def __post_init__(self):
        super().__post_init__()
        positive(self, "peak_lr", "eps", "clip_norm")
        below_one(self, "beta1", "beta2")
        not_negative(self, "warmup_steps")
        if not 0 <= self.end_lr <= self.peak_lr <= 1:  # AdamW's steps are as long as the rate
            raise ConfigError(
                "OptimizerConfig.end_lr must lie between 0 and peak_lr, and that below 1: "
                f"got {self.end_lr}, peak_lr {self.peak_lr}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterRule(Settings):
    """One row of the table that says what trains: the first row that matches a path decides.

    `pattern` is a shell pattern over the dotted path, in which `*` also matches dots:
    `vit.blocks.*.kernel`, `*.bias`.
    """

    pattern: str = dataclasses.field(kw_only=False)
    is_trained: bool = True
    rate: float = 1.0  # factor on the learning rate
    # Layer i of K stacked ones has this to the power K - i as a further factor, what stands before
    # the layers of its part the power K + 1: 0.95 for the tower in stages 1 and 2.
    layer_decay: float = 1.0
    weight_decay: float = 0.0  # multiplied by the row's rate too, as AdamW does

    def __post_init__(self):
        super().__post_init__()
        positive(self, "rate", "layer_decay")
        if not 0 <= self.weight_decay <= 1:  # nor NaN
            raise ConfigError(
                f"ParameterRule.weight_decay of {self.pattern!r} must lie in 0..1: "
                f"got {self.weight_decay}"
            )
        if not self.is_trained and (self.rate, self.layer_decay, self.weight_decay) != (1, 1, 0):
            raise ConfigError(
                f"the row {self.pattern!r} is not trained, so its rates have no effect: got "
                f"rate={self.rate}, layer_decay={self.layer_decay}, "
                f"weight_decay={self.weight_decay}; leave them out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Settings):
    """How many devices each mesh axis spans; `fsdp=-1` takes what is left."""

    data: int = 1  # copies of the model
    fsdp: int = -1  # splits weights, moments and the batch
    tensor: int = 1  # splits heads, MLPs and the vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings):
    """How often to save, and how many saves to keep."""

    every_steps: int = 1000  # and at the end, and when the run is stopped
    keep: int = 3  # the newest ones; older ones are deleted

    def __post_init__(self):
        super().__post_init__()
        positive(self, "every_steps", "keep")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig(Settings):
    """What a run does about steps that go wrong."""

    stop_after: int = 3  # steps in a row whose update was refused
    spike: Literal["off", "warn", "skip", "rewind"] = "warn"  # when a loss jumps
    spike_sigmas: float = 6.0  # above the mean of the last 128 losses
    rewind_margin: int = 100  # batches passed over behind a spike, after going back before it
    digest_every: int = 1000  # steps between comparisons of replicated parameters; 0: never
    data_timeout: float = 900.0  # seconds without a batch that end the run
    grace_seconds: float = 30.0  # between SIGTERM and SIGKILL, as the machine's owner gives them

    def __post_init__(self):
        super().__post_init__()
        positive(self, "stop_after", "spike_sigmas", "data_timeout", "grace_seconds")
        not_negative(self, "rewind_margin", "digest_every")
        idle = {"off": ["spike_sigmas", "rewind_margin"], "rewind": []}
        names = idle.get(self.spike, ["rewind_margin"])
        unused(self, "GuardConfig", names, f"spike={self.spike!r}; set another spike policy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Settings):
    """What is looked at while a run trains: its loss on held-out data, and some of its answers."""

    every_steps: int = 0  # and at the end; 0: never
    batches: int = 4  # of held-out data, each as large as a micro-batch
    samples: int = 8  # held-out samples whose answers are drawn on their picture
    max_new_tokens: int = 64  # of an answer
    path: str = ""  # the held-out rows of data.source="rows"; scenes hold out their own

    def __post_init__(self):
        super().__post_init__()
        positive(self, "batches", "max_new_tokens")
        not_negative(self, "every_steps", "samples")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """One run. The resolved values are printed, and saved beside the checkpoints."""

    run_dir: str  # for checkpoints and metrics; a run that is in it resumes
    steps: int  # updates in all, each of `data.rows` packed rows
    seed: int  # of data order, dropout and new weights
    init: str | None  # a checkpoint to start from (ours or released); None: random weights
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    parameters: tuple[ParameterRule, ...]  # what trains, and how fast; the first match decides
    frozen_dtype: DType | None = None  # of parameters that do not train; None: model.param_dtype
    micro_batches: int = 1  # gradient accumulation: parts of a step, one after another
    loss_chunk: int = 256  # tokens of a device whose logits exist at once
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    log_every: int = 10  # steps between two lines of numbers
    skip_steps: tuple[str, ...] = ()  # "A:B": the batches of steps A to B are left out
    allow_change: tuple[str, ...] = ()  # settings that this start may change, of a run begun before
    simulate_fault: tuple[str, ...] = ()  # "NAME@STEP", to see what happens (docs/reliability.md)

    def __post_init__(self):
        super().__post_init__()
        positive(self, "steps", "micro_batches", "loss_chunk", "log_every")
        if self.steps >= 2**31:  # the device counts them in 32 bits
            raise ConfigError(f"TrainConfig.steps must be below 2**31: got {self.steps}")
        if not self.run_dir:
            raise ConfigError("TrainConfig.run_dir is empty: name a folder, e.g. runs/mine")
        if self.model.param_dtype != "float32":
            raise ConfigError(
                f"what trains is kept in float32: got model.param_dtype={self.model.param_dtype}; "
                "use frozen_dtype=bfloat16 for what does not train, and model.dtype for products"
            )
        if not 0 <= self.seed < 2**32:  # JAX drops what is above
            raise ConfigError(f"TrainConfig.seed must lie in 0 .. 2**32 - 1: got {self.seed}")
        patch, most = self.model.vision.patch_size, self.model.decoder.max_positions
        multiple("data.image_size", self.data.image_size, "vision.patch_size", patch)
        slots = self.model.adapter.num_queries + 2  # with its two markers
        if self.data.max_images * slots > self.data.length:
            raise ConfigError(
                f"data.max_images is more than a row holds: got {self.data.max_images}, "
                f"expected at most {self.data.length // slots}: each takes {slots} tokens of "
                f"data.length={self.data.length}"
            )
        answer = self.evaluation.max_new_tokens if self.evaluation.every_steps else 0
        if max(self.data.length, answer + 1) > most:
            raise ConfigError(
                "data.length, and evaluation.max_new_tokens with its question, must not exceed "
                f"decoder.max_positions: got {self.data.length} and {answer}, max_positions {most}"
            )
        if self.data.rows % self.micro_batches:
            raise ConfigError(
                "TrainConfig.micro_batches must divide data.rows: "
                f"got micro_batches={self.micro_batches}, rows={self.data.rows}"
            )
        if self.optimizer.warmup_steps >= self.steps:
            raise ConfigError(
                "optimizer.warmup_steps must be smaller than steps: got "
                f"{self.optimizer.warmup_steps} of {self.steps}; give both"
            )
        if not any(rule.is_trained for rule in self.parameters):
            raise ConfigError("TrainConfig.parameters has no trained row: nothing would be trained")


def to_dict(config: Any) -> dict[str, Any]:
    """Returns nested plain dicts of a config, ready to be JSON."""
    return dataclasses.asdict(config)
