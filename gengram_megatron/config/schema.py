"""Every key of a config file: its name, type, default and meaning.

`gengram config CONFIG` prints a config with all defaults filled in. Checks that concern one
value stand beside it; checks between keys (layouts, divisibility) are in `problems/`.
"""

from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from gengram_megatron.config.keys import Fraction, Name, NonNegative, Positive, Section
from gengram_megatron.config.launch import Launch


class Run(Section):
    """Where a run lives, and the seed that decides all its random numbers."""

    dir: Name = Field(
        description="folder of the run, relative to the current one; training resumes from what it "
        "holds"
    )
    seed: NonNegative = Field(1234, description="weights, and the order of the samples")


class Hashing(Section):
    """Tables for k above 8, whose rows are found by hashing."""

    rows: Annotated[int, Field(ge=64, lt=2**31)] = Field(
        1_048_576,
        description="of each table at most: the largest primes up to it, another for each table",
    )
    heads: Positive = Field(2, description="tables a k; each has dim / heads columns")
    seed: NonNegative = Field(0, description="another seed, other collisions")


class Gengram(Section):
    """The k-mer memory (Gengram paper, section 3). Layers count from 1."""

    enabled: bool = Field(False, description="false: the baseline without memory")
    layers: list[Positive] = Field([3, 6, 10], description="decoder layers with memory, from 1")
    kmer_sizes: list[Annotated[int, Field(ge=1, le=27)]] = Field(
        [1, 2, 3, 4, 5, 6],
        description="a table of 5^k rows for each k up to 8; hashed tables above",
        min_length=1,
    )
    hashing: Hashing = Hashing()
    share_reverse_complements: bool = Field(
        False, description="a k-mer and its reverse complement share a row"
    )
    dim: Positive = Field(1024, description="d_m, columns of each table")
    window: Positive | None = Field(
        21, description="W, tokens in the window; null: only the k-mer that ends at each token"
    )
    token_ids: list[NonNegative] = Field(
        [8, 5, 6, 7, 9],
        description="ids of A C G T N, the digits 0 to 4 of a row's number",
        min_length=5,
        max_length=5,
    )
    deduplicate: bool = Field(
        False, description="count a k-mer once a window (equation 7); the published code does not"
    )
    reset_at_document: bool = Field(
        False, description="stop windows, k-mers and the convolution at EOD"
    )
    signed_sqrt: bool = Field(
        True, description="signed square root before the gate's sigmoid; the paper leaves it out"
    )
    output: Literal["convolution", "norm", "plain"] = Field(
        "convolution",
        description="o + SiLU(conv(o)) of the published code, SiLU(RMSNorm(o)) of equation 13, "
        "or o; o is the gated value",
    )
    split: Literal["auto", "columns", "rows"] = Field(
        "auto",
        description="how ranks share a table; auto: columns up to k = 6, above it rows where a "
        "rank would hold 1 GiB or more of it, its gradient and Adam's states",
    )
    rows_over: Literal["tensor", "expert", "data"] | None = Field(
        None,
        description="the ranks that share tables split by rows; null: data, all that hold copies",
    )
    project: Literal["auto", "features", "tables"] = Field(
        "auto",
        description="what is mapped to key and value, with the same result: each token's features, "
        "or the tables, once a step; auto: tables on CPUs, where a rank has more tokens a step "
        "than the tables have rows on average",
    )
    projection_bias: bool = Field(
        False,
        description="bias terms in the maps to key and value, as in equation 11; the published code "
        "has none",
    )
    conv_kernel: Positive = Field(4, description="taps of the causal depthwise convolution")
    init: Literal["published", "scaled"] = Field(
        "published",
        description="initial weights; published: tables normal with standard deviation 1, maps to "
        "key and value and convolution uniform within 1 / sqrt(inputs), torch's defaults; scaled: "
        "all normal with model.init_std, the bias of the maps zero",
    )
    init_std: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="standard deviation of the tables at the start; null: 1 where init is "
        "published, model.init_std where it is scaled",
    )


class MultiLatentAttention(Section):
    """Sizes of multi-latent attention, read when model.attention is mla."""

    kv_lora_rank: Positive = Field(512, description="width of the latent keys and values")
    q_lora_rank: Positive | None = Field(None, description="null: no low-rank query")
    qk_head_dim: Positive = Field(128, description="query and key width a head, unrotated part")
    qk_pos_emb_head_dim: Positive = Field(64, description="the rotated part")
    v_head_dim: Positive = Field(128, description="value width a head")


class Model(Section):
    """The decoder: Genos-like blocks of attention and SwiGLU, dense or mixture of experts."""

    hidden_size: Positive = Field(description="width of the residual stream")
    num_layers: Positive = Field(description="decoder layers")
    num_attention_heads: Positive = Field(description="query heads")
    num_query_groups: Positive | None = Field(
        None,
        description="key-value heads of gqa; null: one for two query heads, or for each where their "
        "number is odd; null for mha and mla",
    )
    attention: Literal["mha", "gqa", "mla"] = Field(
        "gqa", description="multi-head, grouped-query or multi-latent attention"
    )
    ffn_hidden_size: Positive = Field(description="SwiGLU width (of each expert)")
    num_experts: Positive | None = Field(None, description="null: a dense model")
    moe_router_topk: Positive = Field(2, description="experts a token goes to")
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="weight of the loss that balances experts"
    )
    moe_z_loss_coeff: Annotated[float, Field(ge=0)] = Field(
        1e-3, description="weight of the loss that keeps router logits small"
    )
    seq_length: Positive = Field(description="bases a sample")
    vocab_size: Annotated[int, Field(ge=13)] = Field(
        256,
        description="rows of the embedding: the 13 ids in use and padding; the same in every layout",
    )
    norm_epsilon: Annotated[float, Field(gt=0)] = Field(1e-5, description="of RMSNorm")
    rotary_base: Positive = Field(10_000, description="of the rotary position embedding")
    init_std: Annotated[float, Field(gt=0)] = Field(
        0.01, description="standard deviation of the weights at the start"
    )
    implementation: Literal["auto", "torch", "transformer_engine"] = Field(
        "auto", description="auto: torch; transformer_engine only where it is asked for"
    )
    mla: MultiLatentAttention = MultiLatentAttention()
    gengram: Gengram = Gengram()

    @model_validator(mode="before")
    @classmethod
    def _default_groups(cls, given: Any) -> Any:
        """The number of groups that null stands for, so that nothing later has to work it out, and
        the config in a run's folder says it."""
        if not isinstance(given, dict) or given.get("num_query_groups") is not None:
            return given
        heads = given.get("num_attention_heads")
        if given.get("attention", "gqa") != "gqa" or type(heads) is not int or heads < 1:
            return given
        return {**given, "num_query_groups": heads if heads % 2 else heads // 2}


class Parallel(Section):
    """How the work is split. data-parallel size = world size / (tensor * pipeline * context)."""

    tensor: Positive = Field(1, description="ranks that share each layer")
    pipeline: Positive = Field(1, description="ranks that layers are dealt out to")
    virtual_pipeline: Positive | None = Field(
        None, description="model chunks a pipeline rank (interleaved schedule); null: one"
    )
    first_stage_layers: Positive | None = Field(
        None, description="decoder layers of the first pipeline rank; null: as many as the others"
    )
    last_stage_layers: Positive | None = Field(
        None, description="decoder layers of the last pipeline rank; null: as many as the others"
    )
    context: Positive = Field(1, description="ranks that share each sequence")
    expert: Positive = Field(1, description="ranks that experts are dealt out to")
    expert_tensor: Positive | None = Field(
        None, description="tensor-parallel size inside experts; null: parallel.tensor"
    )
    sequence: bool | None = Field(
        None, description="sequence parallelism; null: wherever parallel.tensor > 1"
    )


class BlendPart(Section):
    """One built data set of a blend."""

    path: Name = Field(description="folder of a built data set, relative to the current one")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="its share of the samples is its weight over the sum of all weights"
    )
    name: Name | None = Field(None, description="in metrics; null: the folder's own name")

    @property
    def label(self) -> str:
        """What metrics and messages call it."""
        return self.name or Path(self.path).name or self.path


class Data(Section):
    """What training reads: one data set that `gengram-data build` wrote, or a blend of several."""

    path: Name | None = Field(
        None,
        description="folder of a built data set, relative to the current one, as `gengram-data "
        "build` wrote it; give path or blend",
    )
    blend: Annotated[list[BlendPart], Field(min_length=1)] | None = Field(
        None, description="entries {path, weight, name}: built data sets and their shares"
    )
    tokenizer: str | None = Field(
        None,
        description="a SentencePiece model to check the ids against, relative to the file that "
        "names it; null: the built-in ids",
    )
    workers: NonNegative = Field(1, description="background processes that read samples")

    @model_validator(mode="after")
    def _check(self) -> "Data":
        if (self.path is None) == (self.blend is None):
            raise ValueError(
                "samples come from path or from blend, but neither is given; give one"
                if self.path is None
                else "samples come from path or from blend, but both are given; set one to null"
            )
        parts = enumerate(self.blend or [], start=1)
        for (one, first), (other, second) in combinations(parts, 2):
            if first.label == second.label:
                raise ValueError(
                    f"entries {one} and {other} of blend are both named {first.label}; give one "
                    "of them another name"
                )
        return self


class Tables(Section):
    """What the Gengram tables get instead of the settings of all other weights."""

    lr_multiplier: Annotated[float, Field(gt=0)] = Field(
        1.0, description="their learning rate over that of the rest"
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="null: optimizer.weight_decay"
    )


class Optimizer(Section):
    """Adam with decoupled weight decay, cosine schedule with warm-up, counted in samples."""

    lr: Annotated[float, Field(gt=0)] = Field(1e-4, description="peak learning rate")
    min_lr: Annotated[float, Field(ge=0)] = Field(1e-5, description="where the cosine ends")
    warmup_fraction: Fraction = Field(
        0.05,
        description="share of all samples (train.samples, or steps * global_batch_size) in which lr "
        "rises from 0; Megatron-LM's --lr-warmup-fraction is a share of the decay's samples "
        "instead, so what it calls F is F * decay_fraction here",
    )
    decay_fraction: Fraction = Field(
        1.0,
        description="share of all samples, warm-up included, rounded down to whole samples, after "
        "which lr stays at min_lr",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="decoupled, as in AdamW")
    beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Adam's first moment")
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.999, description="Adam's second moment; the default is Megatron-LM's"
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="Adam's epsilon")
    clip_grad: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest gradient norm; 0: no clipping"
    )
    distributed: bool = Field(True, description="shard optimizer states over data-parallel ranks")
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients while the backward pass goes on"
    )
    overlap_param_gather: bool = Field(
        False, description="gather updated weights while the forward pass goes on"
    )
    tables: Tables = Tables()


class Fp8(Section):
    """How Transformer Engine computes in fp8, read when train.precision is fp8. Recipes that scale
    by the numbers of earlier steps (delayed) are not offered: a run could not go on from a
    checkpoint with the same losses."""

    recipe: Literal["tensorwise", "blockwise", "mxfp8"] = Field(
        "tensorwise",
        description="numbers that share a scale: a tensor's (Ada and later), a block's (Hopper "
        "and later, CUDA 12.9), or 32 (Blackwell of data centres)",
    )
    format: Literal["hybrid", "e4m3"] | None = Field(
        None,
        description="hybrid: e4m3, and e5m2 for the gradients of activations; null: hybrid with a "
        "scale a tensor, e4m3 with smaller blocks",
    )


class DeepSpeed(Section):
    """What DeepSpeed shares or moves out of the way; read when train.engine is deepspeed."""

    zero_stage: Annotated[int, Field(ge=1, le=3)] = Field(
        1,
        description="data-parallel ranks share Adam's states (1), gradients too (2), weights too (3)",
    )
    offload_optimizer: bool = Field(
        False, description="master weights and Adam's states lie in the memory of the host"
    )
    offload_parameters: bool = Field(
        False, description="weights lie in the memory of the host between uses; zero_stage 3"
    )
    extra: dict[str, Any] = Field(
        {},
        description="more of DeepSpeed's own config, such as zero_optimization: {overlap_comm: "
        "true}; nothing that other keys decide",
    )


class Train(Section):
    """How long, in which precision, with which batches."""

    global_batch_size: Positive = Field(description="samples a step, over all ranks")
    micro_batch_size: Positive = Field(1, description="samples of one forward pass")
    steps: Positive | None = Field(None, description="give steps or samples, not both")
    samples: Positive | None = Field(None, description="rounded down to whole steps")
    stop_at: Positive | None = Field(
        None,
        description="step after which this job ends with a checkpoint; the schedule and a later "
        "job go on to the last step",
    )
    precision: Literal["bf16", "fp32", "fp8"] = Field(
        "bf16",
        description="of weights and activations; gradients add up in fp32; fp8: bf16, but for the "
        "products of attention, feed-forward and experts, by Transformer Engine",
    )
    disable_bf16_reduced_precision_matmul: bool = Field(
        True,
        description="partial sums of a bf16 product are added up in fp32 on GPUs, as the published "
        "launches ask for; false: in bf16 where cuBLAS finds it faster; without bf16 no matter",
    )
    fp8: Fp8 = Fp8()
    engine: Literal["megatron", "deepspeed"] = Field(
        "megatron",
        description="who adds up gradients and steps: megatron-core or DeepSpeed's ZeRO",
    )
    deepspeed: DeepSpeed = DeepSpeed()
    deterministic: bool = Field(
        True,
        description="the same bits every time, without which a resumed run drifts by rounding; "
        "on GPUs the backward pass of flash attention is slower for it",
    )
    on_nan: Literal["stop", "skip"] = Field(
        "stop",
        description="after a loss or gradient that is not finite: stop and say where it arose, or "
        "leave the batch out (and stop after ten in a row)",
    )
    watchdog_seconds: Annotated[float, Field(gt=0)] | None = Field(
        1200,
        description="without progress for so long the job ends, and says which rank hangs and "
        "where; longer than any step, batch of a validation or save takes; null: never",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none", description="activations recomputed in the backward pass"
    )
    validation_interval: Positive | None = Field(
        None, description="steps between validations; null: at the end only"
    )
    validation_samples: Positive | None = Field(
        None,
        description="samples of each validation, at most all, and of a blend's sets in its "
        "shares; null: all",
    )

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """Of weights and activations, which fp8 leaves in bf16."""
        return "fp32" if self.precision == "fp32" else "bf16"


class Checkpoint(Section):
    """Checkpoints of the run's folder, and the one that a new run starts from."""

    load: Name | None = Field(
        None,
        description="a checkpoint, or a run's folder for its newest, relative to the current "
        "folder, whose weights a new run starts from, with data, optimizer, schedule and steps of its own; seq_length and "
        "rotary_base of the model may differ; null: weights drawn from the seed",
    )
    interval: Positive | None = Field(None, description="steps between; null: at the end only")
    at_end: bool = Field(
        True, description="one after the last step; false for runs that only measure"
    )
    keep: Positive | None = Field(None, description="newest checkpoints that stay; null: all")
    keep_every: Positive | None = Field(
        None,
        description="besides, those of steps that this divides stay for good; a multiple of "
        "interval; null: no others",
    )
    asynchronous: bool = Field(True, description="write while training goes on")


class WeightsAndBiases(Section):
    """Weights & Biases, from the extra `wandb`."""

    project: Name
    name: Name | None = Field(None, description="null: Weights & Biases invents one")


class Logging(Section):
    """What is reported, and how often."""

    interval: Positive = Field(1, description="steps between progress lines")
    wandb: WeightsAndBiases | None = None


class Config(Section):
    """A whole run."""

    input_files: ClassVar[tuple[str, ...]] = ("data.tokenizer",)
    absolute_inputs: ClassVar[bool] = True  # a run's folder and checkpoints hold copies

    run: Run
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    optimizer: Optimizer = Optimizer()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    launch: Launch = Launch()
