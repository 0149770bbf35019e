"""Every key of a config file: its name, type, default and meaning.

`gengram config CONFIG` prints a config with all defaults filled in. Checks of a single value are
here; checks between keys (layouts, divisibility) are in `problems/`.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gengram_megatron.config.keys import Fraction, Name, NonNegative, Positive, Section
from gengram_megatron.config.launch import Launch


class Run(Section):
    """The run's folder, and the seed of all its random numbers."""

    dir: Name = Field(
        description="folder of the run, relative to the current folder; training resumes from "
        "its checkpoints"
    )
    seed: NonNegative = Field(
        1234, description="seed of the initial weights and of the order of the samples"
    )


class Hashing(Section):
    """Hashed tables, used for k above 8."""

    rows: Annotated[int, Field(ge=64, lt=2**31)] = Field(
        1_048_576,
        description="most rows of a table; table sizes are the largest primes up to it, a different "
        "one for each table",
    )
    heads: Positive = Field(2, description="tables per k; each has dim / heads columns")
    seed: NonNegative = Field(0, description="seed of the hashes; changes which k-mers collide")


class Gengram(Section):
    """The k-mer memory (Gengram paper, section 3). Layers count from 1."""

    enabled: bool = Field(False, description="false: the baseline without Gengram")
    layers: list[Positive] = Field(
        [3, 6, 10], description="decoder layers with Gengram, counted from 1"
    )
    kmer_sizes: list[Annotated[int, Field(ge=1, le=27)]] = Field(
        [1, 2, 3, 4, 5, 6],
        description="lengths k of the k-mers; a table of 5^k rows for each k up to 8, hashed tables "
        "above",
        min_length=1,
    )
    hashing: Hashing = Hashing()
    share_reverse_complements: bool = Field(
        False, description="a k-mer and its reverse complement share a row"
    )
    dim: Positive = Field(1024, description="d_m, number of columns of each table")
    window: Positive | None = Field(
        21,
        description="W, number of tokens in the window; null: only the k-mer that ends at each "
        "token",
    )
    token_ids: list[NonNegative] = Field(
        [8, 5, 6, 7, 9],
        description="token ids of A C G T N, the digits 0 to 4 of a row number",
        min_length=5,
        max_length=5,
    )
    deduplicate: bool = Field(
        False,
        description="count each distinct k-mer of a window once (equation 7); the published code "
        "does not",
    )
    reset_at_document: bool = Field(
        False, description="windows, k-mers and the convolution do not reach across EOD"
    )
    signed_sqrt: bool = Field(
        True,
        description="signed square root before the gate's sigmoid, as in the published code; the "
        "paper leaves it out",
    )
    output: Literal["convolution", "norm", "plain"] = Field(
        "convolution",
        description="convolution: o + SiLU(conv(o)), as in the published code; norm: "
        "SiLU(RMSNorm(o)), as in equation 13; plain: o; o is the gated value",
    )
    split: Literal["auto", "columns", "rows"] = Field(
        "auto",
        description="how a table is split over ranks; auto: by columns up to k = 6, above that by "
        "rows if a rank would otherwise hold 1 GiB or more for the table, its gradient and its Adam "
        "states",
    )
    rows_over: Literal["tensor", "expert", "data"] | None = Field(
        None,
        description="process group that rows are split over; null: data, all ranks that would hold "
        "copies",
    )
    project: Literal["auto", "features", "tables"] = Field(
        "auto",
        description="what is projected to key and value, with the same result: each token's "
        "features, or the tables, once per step; auto: tables on CPUs if a rank has more tokens per "
        "step than a table has rows on average",
    )
    projection_bias: bool = Field(
        False,
        description="bias in the projections to key and value, as in equation 11; the published "
        "code has none",
    )
    conv_kernel: Positive = Field(4, description="kernel size of the causal depthwise convolution")
    init: Literal["published", "scaled"] = Field(
        "published",
        description="initial weights; published: tables normal with standard deviation 1, key and "
        "value projections and convolution uniform within 1 / sqrt(inputs), torch's defaults; "
        "scaled: all normal with standard deviation model.init_std, the projections' bias zero",
    )
    init_std: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="initial standard deviation of the tables; null: 1 if init is published, "
        "model.init_std if it is scaled",
    )


class MultiLatentAttention(Section):
    """Sizes of multi-latent attention, read if model.attention is mla."""

    kv_lora_rank: Positive = Field(512, description="width of the latent keys and values")
    q_lora_rank: Positive | None = Field(
        None, description="width of the latent queries; null: queries are not compressed"
    )
    qk_head_dim: Positive = Field(
        128, description="query and key width per head, part without rotary embedding"
    )
    qk_pos_emb_head_dim: Positive = Field(
        64, description="query and key width per head, part with rotary embedding"
    )
    v_head_dim: Positive = Field(128, description="value width per head")


class Model(Section):
    """The decoder: Genos-like blocks of attention and SwiGLU, dense or mixture of experts."""

    hidden_size: Positive = Field(description="width of the residual stream")
    num_layers: Positive = Field(description="number of decoder layers")
    num_attention_heads: Positive = Field(description="number of query heads")
    num_query_groups: Positive | None = Field(
        None,
        description="number of key-value heads for gqa; null: half the query heads, or as many if "
        "their number is odd; must be null or the number of heads for mha and mla",
    )
    attention: Literal["mha", "gqa", "mla"] = Field(
        "gqa", description="multi-head, grouped-query or multi-latent attention"
    )
    ffn_hidden_size: Positive = Field(
        description="SwiGLU width, that of each expert in a mixture of experts"
    )
    num_experts: Positive | None = Field(
        None, description="number of experts per layer; null: a dense model"
    )
    moe_router_topk: Positive = Field(2, description="experts per token")
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="weight of the load-balancing loss"
    )
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="weight of the loss that keeps router logits small"
    )
    seq_length: Positive = Field(description="bases per sample")
    vocab_size: Annotated[int, Field(ge=13)] = Field(
        256,
        description="rows of the embedding: the 13 ids in use and padding; the same in every layout",
    )
    norm_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="epsilon of RMSNorm")
    rotary_base: Positive = Field(
        10_000, description="base of the rotary position embedding's frequencies"
    )
    init_std: Annotated[float, Field(gt=0)] = Field(
        0.01, description="standard deviation of the initial weights"
    )
    implementation: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: torch; Transformer Engine is used only if set explicitly"
    )
    mla: MultiLatentAttention = MultiLatentAttention()
    gengram: Gengram = Gengram()

    @model_validator(mode="before")
    @classmethod
    def _default_groups(cls, given: Any) -> Any:
        """Replaces a null num_query_groups of gqa by its number, so that no other code has to
        derive it and the config in the run's folder states it."""
        if not isinstance(given, dict) or given.get("num_query_groups") is not None:
            return given
        heads = given.get("num_attention_heads")
        if given.get("attention", "gqa") != "gqa" or type(heads) is not int or heads < 1:
            return given
        return {**given, "num_query_groups": heads if heads % 2 else heads // 2}


class Parallel(Section):
    """Parallel sizes. Data-parallel size = world size / (tensor * pipeline * context)."""

    tensor: Positive = Field(1, description="tensor-parallel size: ranks that share each layer")
    pipeline: Positive = Field(
        1, description="pipeline-parallel size: ranks that layers are distributed over"
    )
    virtual_pipeline: Positive | None = Field(
        None, description="model chunks per pipeline rank (interleaved schedule); null: one"
    )
    first_stage_layers: Positive | None = Field(
        None, description="decoder layers of the first pipeline rank; null: as many as the others"
    )
    last_stage_layers: Positive | None = Field(
        None, description="decoder layers of the last pipeline rank; null: as many as the others"
    )
    context: Positive = Field(
        1, description="context-parallel size: ranks that share each sequence"
    )
    expert: Positive = Field(
        1, description="expert-parallel size: ranks that experts are distributed over"
    )
    expert_tensor: Positive | None = Field(
        None, description="tensor-parallel size inside experts; null: parallel.tensor"
    )
    sequence: bool | None = Field(
        None, description="sequence parallelism; null: on if parallel.tensor > 1"
    )


class BlendPart(Section):
    """One built data set of a blend."""

    path: Name = Field(description="folder of a built data set, relative to the current folder")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="its share of the samples is its weight over the sum of all weights"
    )
    name: Name | None = Field(None, description="name in metrics; null: the name of the folder")

    @property
    def label(self) -> str:
        """The name of the data set in metrics and messages."""
        return self.name or Path(self.path).name or self.path


class Data(Section):
    """The training data: one data set written by `gengram-data build`, or a blend of several."""

    path: Name | None = Field(
        None,
        description="folder of a data set built by `gengram-data build`, relative to the current "
        "folder; give path or blend",
    )
    blend: Annotated[list[BlendPart], Field(min_length=1)] | None = Field(
        None, description="list of built data sets and their shares, entries {path, weight, name}"
    )
    tokenizer: str | None = Field(
        None,
        description="SentencePiece model to check the ids against, relative to the file that names "
        "it; null: no check of the built-in ids",
    )
    workers: NonNegative = Field(1, description="number of background processes that read samples")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if (self.path is None) == (self.blend is None):
            raise ValueError(
                "samples come from path or from blend, but neither is given; give one"
                if self.path is None
                else "samples come from path or from blend, but both are given; set one to null"
            )
        parts = enumerate(self.blend or [], start=1)
        for (number, part), (other_number, other) in combinations(parts, 2):
            if part.label == other.label:
                raise ValueError(
                    f"entries {number} and {other_number} of blend are both named {part.label}; "
                    "give one of them another name"
                )
        return self


class Tables(Section):
    """Settings of the Gengram tables that differ from those of all other weights."""

    lr_multiplier: Annotated[float, Field(gt=0)] = Field(
        1.0, description="factor on the learning rate for the tables"
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="weight decay of the tables; null: optimizer.weight_decay"
    )


class Optimizer(Section):
    """Adam with decoupled weight decay, and a cosine schedule with warm-up, counted in samples."""

    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    min_lr: Annotated[float, Field(ge=0)] = Field(
        1e-5, description="learning rate at the end of the cosine"
    )
    warmup_fraction: Fraction = Field(
        0.05,
        description="share of all samples (train.samples, or steps * global_batch_size) over which "
        "lr rises from 0; Megatron-LM's --lr-warmup-fraction is a share of the decay's samples "
        "instead, so its F is F * decay_fraction here",
    )
    decay_fraction: Fraction = Field(
        1.0,
        description="share of all samples, including the warm-up and rounded down to whole samples, "
        "after which lr stays at min_lr",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="decoupled weight decay, as in AdamW"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="decay rate of Adam's first moment"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="decay rate of Adam's second moment; the default is Megatron-LM's"
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon")
    clip_grad: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gradient norm above which gradients are clipped to it; 0: no clipping"
    )
    distributed: bool = Field(True, description="shard optimizer states over data-parallel ranks")
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients during the backward pass"
    )
    overlap_param_gather: bool = Field(
        False, description="gather updated weights during the forward pass"
    )
    tables: Tables = Tables()


class Fp8(Section):
    """How Transformer Engine computes in fp8, read if train.precision is fp8. Delayed scaling,
    which depends on earlier steps, is not offered: a run resumed from a checkpoint would not give
    the same losses."""

    recipe: Literal["tensorwise", "blockwise", "mxfp8"] = Field(
        "tensorwise",
        description="values that share a scaling factor; tensorwise: a tensor (Ada and later); "
        "blockwise: a block (Hopper and later, CUDA 12.9); mxfp8: 32 values (data-centre Blackwell)",
    )
    format: Literal["hybrid", "e4m3"] | None = Field(
        None,
        description="hybrid: e4m3, and e5m2 for the gradients of activations; null: hybrid for "
        "tensorwise, e4m3 for the other recipes",
    )


class DeepSpeed(Section):
    """What DeepSpeed shards and offloads; read if train.engine is deepspeed."""

    zero_stage: Annotated[int, Field(ge=1, le=3)] = Field(
        1,
        description="data-parallel ranks shard Adam's states (1), gradients too (2), weights too (3)",
    )
    offload_optimizer: bool = Field(
        False, description="keep master weights and Adam's states in host memory"
    )
    offload_parameters: bool = Field(
        False, description="keep weights in host memory between uses; needs zero_stage 3"
    )
    extra: dict[str, Any] = Field(
        {},
        description="further keys of DeepSpeed's config, such as zero_optimization: {overlap_comm: "
        "true}; none that other keys of this config decide",
    )


class Train(Section):
    """Length of the run, batches, precision and engine."""

    global_batch_size: Positive = Field(description="samples per step, over all ranks")
    micro_batch_size: Positive = Field(1, description="samples per forward pass on one rank")
    steps: Positive | None = Field(
        None, description="length of the run in steps; give steps or samples, not both"
    )
    samples: Positive | None = Field(
        None, description="length of the run in samples, rounded down to whole steps"
    )
    stop_at: Positive | None = Field(
        None,
        description="step after which this job saves a checkpoint and ends; the schedule still runs "
        "to the last step, and a later job resumes from there",
    )
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        "bf16",
        description="precision of weights and activations; gradients are accumulated in fp32; fp8: "
        "bf16, except that Transformer Engine computes the matrix products of attention, "
        "feed-forward and experts in fp8",
    )
    disable_bf16_reduced_precision_matmul: bool = Field(
        True,
        description="accumulate partial sums of bf16 matrix products in fp32 on GPUs, as the "
        "published launch scripts do; false: in bf16 where cuBLAS finds that faster; no effect "
        "without bf16",
    )
    fp8: Fp8 = Fp8()
    engine: Literal["megatron", "deepspeed"] = Field(
        "megatron",
        description="what reduces gradients and runs the optimizer: megatron-core or DeepSpeed's "
        "ZeRO",
    )
    deepspeed: DeepSpeed = DeepSpeed()
    deterministic: bool = Field(
        True,
        description="bitwise reproducible; false: a resumed run may differ by rounding; makes the "
        "backward pass of flash attention on GPUs slower",
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="after a loss or gradient that is not finite; stop: end and report where it "
        "arose; skip: leave the batch out (and stop after ten in a row)",
    )
    watchdog_seconds: Annotated[float, Field(gt=0)] | None = Field(
        1200,
        description="end the job after this long without progress, and report which rank hangs and "
        "where; must be longer than any step, validation batch or save takes; null: never",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="which activations are recomputed in the backward pass"
    )
    validation_interval: Positive | None = Field(
        None, description="steps between validations; null: only at the end"
    )
    validation_samples: Positive | None = Field(
        None,
        description="samples per validation, at most all; in a blend they are divided by its "
        "shares; null: all",
    )

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """The data type of weights and activations, which is bf16 for fp8 too."""
        return "fp32" if self.precision == "fp32" else "bf16"


class Checkpoint(Section):
    """When the run saves checkpoints, and the checkpoint that a new run starts from."""

    load: Name | None = Field(
        None,
        description="checkpoint, or folder of a run for its newest one, relative to the current "
        "folder; a new run starts from its weights only, with its own data, optimizer, schedule and "
        "steps; model.seq_length and model.rotary_base may differ; null: random weights",
    )
    interval: Positive | None = Field(
        None, description="steps between checkpoints; null: only at the end"
    )
    at_end: bool = Field(
        True, description="save after the last step; false for runs that only measure"
    )
    keep: Positive | None = Field(
        None, description="how many of the newest checkpoints to keep; null: all"
    )
    keep_every: Positive | None = Field(
        None,
        description="also keep the checkpoints of steps that are multiples of this; must be a "
        "multiple of interval; null: no others",
    )
    asynchronous: bool = Field(True, description="write checkpoints while training continues")


class WeightsAndBiases(Section):
    """Logging to Weights & Biases; needs the extra `wandb`."""

    project: Name = Field(description="project that the run is logged to")
    name: Name | None = Field(
        None, description="name of the run; null: Weights & Biases chooses one"
    )


class Logging(Section):
    """What is logged, and how often."""

    interval: Positive = Field(1, description="steps between progress lines")
    wandb: WeightsAndBiases | None = None


class Config(Section):
    """The config of a whole run."""

    input_files: ClassVar[tuple[str, ...]] = ("data.tokenizer",)
    absolute_inputs: ClassVar[bool] = True  # the run's folder and checkpoints store copies

    run: Run
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    optimizer: Optimizer = Optimizer()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    launch: Launch = Launch()
