"""A model as the published code has it, and its checkpoints in the forms of Megatron-LM.

The decoder is megatron-core's own plain GPTModel, each of whose layers carries the memory's
weights; the layers that use them do so by the slow reference.
"""

import io
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config, Model
from tests import reference_gengram


class PublishedMemory(nn.Module):
    """The published code's names and shapes."""

    def __init__(self, model: Model):
        super().__init__()
        gengram, hidden = model.gengram, model.hidden_size
        width = len(gengram.kmer_sizes) * gengram.dim
        self.embeddings = nn.ModuleList(nn.Embedding(5**k, gengram.dim) for k in gengram.kmer_sizes)
        self.key_proj = nn.Linear(width, hidden, bias=False)
        self.value_proj = nn.Linear(width, hidden, bias=False)
        self.norm_q, self.norm_k = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.short_conv = nn.Module()
        self.short_conv.conv = nn.Conv1d(
            hidden, hidden, gengram.conv_kernel, groups=hidden, bias=False
        )

    def added(self, hidden: Tensor, tokens: Tensor, model: Model) -> Tensor:
        """hidden: [s, b, h]; tokens: [b, s]."""
        sizes = model.gengram.kmer_sizes
        tables = {k: table.weight.double() for k, table in zip(sizes, self.embeddings)}
        return reference_gengram.gengram(
            hidden.double(),
            tokens.tolist(),
            tables,
            key=self.key_proj.weight.double(),
            value=self.value_proj.weight.double(),
            norm_hidden=self.norm_q.weight.double(),
            norm_key=self.norm_k.weight.double(),
            taps=self.short_conv.conv.weight[:, 0].t().double(),
            alphabet=model.gengram.token_ids,
            window=model.gengram.window,
        ).to(hidden.dtype)


def published_model(config: Config, layout: Layout):
    """megatron-core's GPTModel with random weights, norms among them; of one pipeline stage."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from gengram_megatron.engine.model.attention import CoreAttention
    from gengram_megatron.engine.model.build import transformer_config

    model, generator = config.model, torch.Generator().manual_seed(11)
    settings = transformer_config(config, layout)
    settings.moe_grouped_gemm = False
    settings.sequence_parallel = False
    spec = get_gpt_layer_local_spec(
        num_experts=model.num_experts,
        normalization="RMSNorm",
        multi_latent_attention=model.attention == "mla",
        qk_layernorm=model.attention == "mla",
    )
    if model.attention == "mla":  # for which megatron-core's torch part lacks arguments
        spec.submodules.self_attention.submodules.core_attention = CoreAttention
    gpt = GPTModel(
        settings,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=model.seq_length,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        share_embeddings_and_output_weights=False,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    for layer in gpt.decoder.layers:
        layer.gengram = PublishedMemory(model)
    with torch.no_grad():
        for weight in gpt.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1))
    return gpt.eval()


@torch.no_grad()
def logits(gpt, config: Config, tokens: Tensor) -> Tensor:
    """[b, s, v], memory in the layers that the config names."""

    def with_memory(layer, args, kwargs):
        hidden = kwargs["hidden_states"]
        added = layer.gengram.added(hidden, tokens, config.model)
        return args, {**kwargs, "hidden_states": hidden + added}

    hooks = [
        gpt.decoder.layers[number - 1].register_forward_pre_hook(with_memory, with_kwargs=True)
        for number in config.model.gengram.layers
    ]
    out = gpt(
        input_ids=tokens,
        position_ids=torch.arange(tokens.shape[1]).expand_as(tokens),
        attention_mask=None,
    )
    for hook in hooks:
        hook.remove()
    return out


def arguments(config: Config, **others) -> Namespace:
    """Of the run, with values of classes that Megatron-LM keeps there. others: over these."""
    from megatron.core.transformer.enums import AttnBackend

    common = {
        "attention_backend": AttnBackend.auto,
        "expert_model_parallel_size": 1,
        "params_dtype": torch.float32,
        "load": Path("/nowhere"),
        "rotary_base": config.model.rotary_base,
        "norm_epsilon": config.model.norm_epsilon,
        "num_attention_heads": config.model.num_attention_heads,
    }
    return Namespace(**common | others)


def save_distributed(gpt, config: Config, folder: Path, metadata=None, extra=None) -> None:
    """megatron-core's own writer, called by every rank; layers stacked unless told otherwise.

    metadata: for megatron-core, how to write. extra: what the checkpoint has besides the model.
    """
    from megatron.core import dist_checkpointing

    iteration = folder / "iter_0000100"
    iteration.mkdir(parents=True, exist_ok=True)
    model = gpt.sharded_state_dict(metadata=metadata)
    state = {"args": arguments(config), "iteration": 100, "model": model, **(extra or {})}
    dist_checkpointing.save(state, str(iteration))
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


def save_ranks(
    gpt,
    config: Config,
    folder: Path,
    tensor: int,
    pipeline: int,
    expert: int = 1,
    experts: str = "transformer_engine",
    expert_tensor: int | None = None,
) -> None:
    """A file a rank, with the names that Transformer Engine's layers have.

    experts: whose names the experts have, transformer_engine, sequential or grouped.
    expert_tensor: how many ranks share an expert; as many as share the rest unless said.
    """
    shared = expert_tensor or tensor
    ranks = [
        (t, p, e)
        for t in range(tensor)
        for p in range(pipeline)
        for e in range(expert)
        if shared == tensor or t == e  # with one rank an expert, and as many of both
    ]
    for t, p, e in ranks:
        model = _of_rank(gpt, config, (t, tensor), (p, pipeline), (e, expert), t % shared, shared)
        if experts == "grouped":
            model = _grouped(model)
        named = {
            _as_transformer_engine(name, config.model, experts): weight.clone()
            for name, weight in model.items()
        }
        named["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"state")
        named["decoder.layers.0.mlp.linear_fc1._extra_state"] = torch.ones(3, dtype=torch.uint8)
        if p == pipeline - 1:
            named["mtp.layers.0.enorm.weight"] = torch.ones(config.model.hidden_size)
            named["mtp.layers.0.hnorm.weight"] = torch.ones(config.model.hidden_size)
            named["embedding.word_embeddings.weight"] = share(
                "word_embeddings.", gpt.state_dict()["embedding.word_embeddings.weight"], t, tensor
            ).clone()
        stage = f"_{p:03d}" if pipeline > 1 else ""
        stage += f"_{e:03d}" if expert > 1 else ""
        file = folder / "iter_0000100" / f"mp_rank_{t:02d}{stage}" / "model_optim_rng.pt"
        file.parent.mkdir(parents=True)
        random_states = [
            {
                "np_rng_state": np.random.get_state(),
                "random_rng_state": random.getstate(),
                "torch_rng_state": torch.get_rng_state(),
            }
        ]
        sizes = {
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "expert_model_parallel_size": expert,
            "expert_tensor_parallel_size": expert_tensor,
        }
        torch.save(
            {
                "args": arguments(config, **sizes),
                "iteration": 100,
                "checkpoint_version": 3.0,
                "model": named,
                "rng_state": random_states,
            },
            file,
        )
    (folder / "latest_checkpointed_iteration.txt").write_text("100")


Part = tuple[int, int]
"""A rank and how many there are."""


def _of_rank(
    gpt,
    config: Config,
    tensor: Part,
    pipeline: Part,
    expert: Part,
    share_of_expert: int,
    shared: int,
) -> dict[str, Tensor]:
    """What one rank has of the whole model, layers and experts counted from 0."""
    layers, found = config.model.num_layers // pipeline[1], {}
    local = (config.model.num_experts or 0) // expert[1]
    for name, weight in gpt.state_dict().items():
        if weight is None or not _on_stage(name, *pipeline, layers):
            continue
        name = _with_local_number(name, pipeline[0] * layers)
        if ".local_experts." not in name:
            found[name] = share(name, weight, *tensor)
            continue
        before, _, after = name.partition(".local_experts.")
        number, _, rest = after.partition(".")
        if int(number) // local == expert[0]:
            name = f"{before}.local_experts.{int(number) % local}.{rest}"
            found[name] = share(name, weight, share_of_expert, shared)
    return found


def _grouped(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """With megatron-core's GroupedMLP: the experts of a layer in two tensors."""
    found: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, weight in model.items():
        if ".local_experts." not in name:
            found[name] = weight
            continue
        layer, _, rest = name.partition("local_experts.")
        number = 1 if rest.endswith("linear_fc1.weight") else 2
        experts.setdefault(f"{layer}weight{number}", []).append(weight)
    for name, weights in experts.items():
        found[name] = grouped(weights, name.endswith("1"))
    return found


def grouped(weights: list[Tensor], first: bool) -> Tensor:
    """weight1 (the first) or weight2 of megatron-core's GroupedMLP, which views the one as
    [experts, h, width], the other as [experts, width, h]."""
    stacked = torch.stack([weight.t() for weight in weights])
    return stacked.reshape(stacked.shape[1], -1) if first else stacked.reshape(-1, stacked.shape[2])


def _on_stage(name: str, stage: int, stages: int, layers: int) -> bool:
    if name.startswith("decoder.layers."):
        return int(name.split(".")[2]) // layers == stage
    return stage == (0 if name.startswith("embedding.") else stages - 1)


def _with_local_number(name: str, first: int) -> str:
    if not name.startswith("decoder.layers."):
        return name
    words = name.split(".")
    words[2] = str(int(words[2]) - first)
    return ".".join(words)


def share(name: str, weight: Tensor, rank: int, ranks: int) -> Tensor:
    """What one tensor-parallel rank holds of a weight."""
    if ".gengram." in name:
        return weight
    if "linear_fc1.weight" in name:
        gate, up = weight.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    by_rows = "linear_qkv. linear_q_proj. linear_kv_up_proj. word_embeddings. output_layer."
    if any(part in name for part in by_rows.split()):
        return weight.chunk(ranks)[rank]
    if any(part in name for part in ("linear_proj.", "linear_fc2.")):
        return weight.chunk(ranks, dim=1)[rank]
    return weight


def _as_transformer_engine(name: str, model: Model, experts: str) -> str:
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    name = name.replace("kv_layernorm.weight", "linear_kv_up_proj.layer_norm_weight")
    if model.num_experts is None:
        return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    for expert in range(model.num_experts if experts == "transformer_engine" else 0):
        for part in ("linear_fc1", "linear_fc2"):
            name = name.replace(
                f"experts.local_experts.{expert}.{part}.weight", f"experts.{part}.weight{expert}"
            )
    return name
