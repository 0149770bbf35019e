"""Experts as grouped products against a loop over experts: forward and every gradient, experts
without tokens, no tokens at all, recomputed activations, gradients of any memory layout."""

import pytest
import torch
from torch import Tensor

HIDDEN, WIDTH = 32, 48
COUNTS = {
    "balanced": [8, 8, 8, 8],
    "uneven": [1, 17, 3, 11],
    "the first and last without tokens": [0, 5, 9, 0],
    "all in one": [0, 0, 13, 0],
    "one token": [0, 1, 0, 0],
    "no tokens": [0, 0, 0, 0],
}
GRADIENTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "expanded": lambda x: torch.full_like(x[:, :1], 0.5).expand(x.shape),
}
"""Upstream gradients, by how they lie in memory."""


def make_experts(dtype: torch.dtype, recompute: bool):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gengram_megatron.engine.model.experts import GroupedExperts
    from gengram_megatron.engine.model.initialize import InitDistribution, init_tag

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_moe_experts=4,
        moe_ffn_hidden_size=WIDTH,
        moe_grouped_gemm=True,
        add_bias_linear=False,
        params_dtype=dtype,
        init_method=init_tag(InitDistribution(std=1.0)),
        output_layer_init_method=init_tag(InitDistribution(std=1.0)),
        recompute_granularity="selective" if recompute else None,
        recompute_modules=["moe_act"] if recompute else None,
    )
    experts = GroupedExperts(4, config, ProcessGroupCollection.use_mpu_process_groups())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return experts


def one_after_the_other(tokens: Tensor, counts: list[int], probs: Tensor, fc1: Tensor, fc2: Tensor):
    """tokens [t, h] sorted by expert; fc1 [e, 2, f, h], gate then up; fc2 [e, h, f]."""
    out, expert_of = [], [expert for expert, count in enumerate(counts) for _ in range(count)]
    for token, prob, expert in zip(tokens, probs, expert_of):
        gate, up = fc1[expert, 0] @ token, fc1[expert, 1] @ token
        out.append(fc2[expert] @ (gate * torch.sigmoid(gate) * up * prob))
    return torch.stack(out) if out else tokens * 0


def close(ours: Tensor, exact: Tensor, tolerance: float) -> bool:
    return ((ours.double() - exact).norm() <= tolerance * exact.norm()).item()


@pytest.mark.parametrize("gradient", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_output_and_every_gradient(one_process, counts, dtype, tolerance, recompute, gradient):
    experts, total = make_experts(dtype, recompute), sum(counts)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn((total, HIDDEN), generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(total, generator=generator).requires_grad_()  # the router's are float32
    ours = [tokens, probs, experts.linear_fc1.weight, experts.linear_fc2.weight]
    exact = [x.detach().double().requires_grad_() for x in ours]
    upstream = gradient(torch.randn((total, HIDDEN), generator=generator).to(dtype))

    out, bias = experts(tokens, torch.tensor(counts), probs)
    expected = one_after_the_other(exact[0], counts, *exact[1:])
    assert bias is None and out.dtype == dtype and out.shape == expected.shape
    assert close(out, expected, tolerance)
    out.backward(upstream)
    expected.backward(upstream.double())
    for mine, right in zip(ours, exact):
        # The loop leaves no gradient where no token went; ours must be there, and zero.
        right = torch.zeros_like(right) if right.grad is None else right.grad
        assert mine.grad is not None and close(mine.grad, right, tolerance)


def test_experts_without_tokens_get_no_gradient(one_process):
    experts = make_experts(torch.float32, recompute=False)
    tokens = torch.randn((14, HIDDEN), generator=torch.Generator().manual_seed(3))
    out, _ = experts(tokens, torch.tensor([0, 5, 9, 0]), torch.ones(14))
    out.sum().backward()
    for weight in experts.parameters():
        assert weight.grad.flatten(1).ne(0).any(1).tolist() == [False, True, True, False]


def test_recomputing_changes_no_bit(one_process, monkeypatch):
    from gengram_megatron.engine.model import experts as module

    results, calls, activation = [], [], module._weighted_swiglu
    monkeypatch.setattr(
        module, "_weighted_swiglu", lambda *args: calls.append(args) or activation(*args)
    )
    for recompute in (False, True):
        experts = make_experts(torch.bfloat16, recompute)
        generator = torch.Generator().manual_seed(4)
        tokens = torch.randn((29, HIDDEN), generator=generator).bfloat16().requires_grad_()
        probs = torch.rand(29, generator=generator).requires_grad_()
        out, _ = experts(tokens, torch.tensor([1, 17, 0, 11]), probs)
        out.square().sum().backward()
        results.append([out, tokens.grad, probs.grad, *(p.grad for p in experts.parameters())])
    assert all(torch.equal(kept, again) for kept, again in zip(*results))
    assert len(calls) == 1 + 2  # once without, and forward and backward with recomputation
