"""Bytes that a plan gives to a rank, against those of a training step of a small model.

On a GPU norms and SwiGLU are one kernel each and keep only their input; here they are made to. The
groups pretend (tests/plan/ranks.py): nobody answers, so numbers are wrong and shapes are right.
"""

import pytest
import torch

from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.plan.memory import of_stage
from gengram_megatron.plan.stages import Split
from tests.plan.meter import Meter
from tests.plan.ranks import as_rank

MODEL = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 256,
    "num_experts": 4,
    "seq_length": 1024,
    "vocab_size": 32,
}
DENSE = {"num_experts": None}
MHA = {"attention": "mha", "num_query_groups": None}
SIZES = {"kv_lora_rank": 32, "qk_head_dim": 8, "qk_pos_emb_head_dim": 16, "v_head_dim": 24}
MLA = {"attention": "mla", "num_query_groups": None, "mla": SIZES}
MEMORY = {"gengram": {"enabled": True, "layers": [2], "dim": 16}}
MODELS = {
    "moe": {},
    "moe_memory": MEMORY,
    "dense_memory": {**DENSE, **MEMORY},
    "dense_mha": {**DENSE, **MHA},
    "dense_mla": {**DENSE, **MLA},
    "moe_mla_queries": {**MLA, "mla": {**SIZES, "q_lora_rank": 48}},
}
LAYOUTS = {
    "pp2": (2, {**DENSE, **MEMORY, "num_layers": 4}, {"pipeline": 2}),
    "pp4": (4, {**DENSE, "num_layers": 4}, {"pipeline": 4}),
    "pp2_vpp2": (2, {**DENSE, "num_layers": 4}, {"pipeline": 2, "virtual_pipeline": 2}),
    "tp2_sp": (2, {**DENSE, **MEMORY}, {"tensor": 2}),
    "tp2": (2, DENSE, {"tensor": 2, "sequence": False}),
    "cp2": (2, {**DENSE, **MEMORY}, {"context": 2}),
    "dp4": (4, {**DENSE, **MEMORY}, {}),
}
CASES = {
    **{
        f"{name}_{recompute}": (1, model, {}, recompute)
        for name, model in MODELS.items()
        for recompute in ("none", "selective", "full")
    },
    **{name: (*case, "none") for name, case in LAYOUTS.items()},
}


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed, grad_normed = x * scale, grad * weight
        shift = (grad_normed * normed).mean(-1, keepdim=True)
        return scale * (grad_normed - normed * shift), (grad * normed).flatten(0, -2).sum(0), None


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    from gengram_megatron.model import build, norm

    own = build.transformer_config

    def with_fused_swiglu(config, layout):
        settings = own(config, layout)
        settings.bias_activation_fusion = True
        return settings

    monkeypatch.setattr(build, "transformer_config", with_fused_swiglu)
    monkeypatch.setattr(
        norm.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x, self.weight, self.eps)
    )


def config_of(case: str, **train) -> tuple[Config, Layout]:
    processes, model, parallel, recompute = CASES[case]
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {**MODEL, **model},
            "parallel": parallel,
            "data": {"path": "unused"},
            "train": {
                "global_batch_size": 8,
                "steps": 4,
                "precision": "fp32",
                "recompute": recompute,
            },
        }
    )
    return config, check_layout(config, processes)


def step(chunks, optimizer, config: Config, layout: Layout) -> None:
    """As the training loop makes one."""
    from gengram_megatron.training.step import forward_backward

    length = config.model.seq_length + 1
    bases = torch.tensor([8, 5, 6, 7], dtype=torch.uint8)
    batches = [bases[torch.randint(0, 4, (1, length))] for _ in range(layout.num_microbatches)]
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    if layout.virtual_pipeline is None:
        layout_batches = iter(batches)
    else:
        layout_batches = iter(batches)
    forward_backward(chunks, layout_batches, config, layout, forward_only=False)
    optimizer.step()


@pytest.mark.parametrize("case", CASES)
def test_peak(case, as_on_a_gpu):
    """Of a step on the first pipeline rank, weights and optimizer included: within 6 %."""
    config, layout = config_of(case)
    from gengram_megatron.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.training.optimizer import build_optimizer

    split = Split(config, layout)
    with as_rank(layout, 0), Meter() as meter:
        chunks = wrap_for_data_parallelism(build_model(config, layout), config, layout)
        planned = of_stage(split, 0)
        held = planned.weights + planned.gradients
        assert meter.now() == pytest.approx(held, rel=0.01)
        optimizer = build_optimizer(config, chunks)
        step(chunks, optimizer, config, layout)
        meter.start_again()
        step(chunks, optimizer, config, layout)
        most = meter.most
    print(
        case, f"{most / 1e6:.2f} {planned.total / 1e6:.2f} {planned.total / most - 1:+.1%}", planned
    )
    assert planned.total == pytest.approx(most, rel=0.06)
