"""Core attention in one process against the softmax written out, forward and gradients.

What context parallelism adds is tested with the layouts; here only its mask, for fewer queries
than keys."""

import pytest
import torch
from torch import Tensor

SHAPES = {
    "mha": (4, 4, 8, 8),
    "gqa": (4, 2, 8, 8),
    "one group": (4, 1, 8, 8),
    "narrower values, as in mla": (4, 4, 12, 8),
    "wider values, in groups": (4, 2, 8, 16),
}
"""Query heads, key-value groups, width of query and key, width of value."""


def slow_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [s, b, heads, d], key and value [t, b, groups, d]; the last query sees all keys."""
    ahead = key.shape[0] - query.shape[0]
    heads_a_group = query.shape[2] // key.shape[2]
    columns = []
    for b in range(query.shape[1]):
        for head in range(query.shape[2]):
            group, rows = head // heads_a_group, []
            for i in range(query.shape[0]):
                seen = slice(0, i + ahead + 1)
                scores = key[seen, b, group] @ query[i, b, head] * scale
                rows.append(torch.softmax(scores, 0) @ value[seen, b, group])
            columns.append(torch.stack(rows))
    stacked = torch.stack(columns, 1).unflatten(1, query.shape[1:3])  # [s, b, heads, d]
    return stacked.flatten(2)


def make_attention(**arguments):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gengram_megatron.engine.model.attention import CoreAttention

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4)
    return CoreAttention(
        config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        **arguments,
    )


def make_inputs(shape, queries: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    heads, groups, wide, value_wide = shape
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in (
            (queries, 2, heads, wide),
            (keys, 2, groups, wide),
            (keys, 2, groups, value_wide),
        )
    ]


def assert_same(attend, inputs: list[Tensor], scale: float, tolerance: float) -> None:
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = attend(*inputs), slow_attention(*exact, scale)
    assert out.shape == expected.shape and out.dtype == inputs[0].dtype
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).double()
    out.backward(weight.to(out.dtype))
    expected.backward(weight)
    pairs = [(out, expected), *((ours.grad, right.grad) for ours, right in zip(inputs, exact))]
    for ours, right in pairs:
        assert (ours.double() - right).norm() <= tolerance * right.norm()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_causal_softmax(one_process, shape, dtype, tolerance):
    attention = make_attention()
    inputs = make_inputs(shape, 17, 17, dtype)
    # By default the scale is that of the config's head width, 32 / 4.
    assert_same(lambda q, k, v: attention(q, k, v, None), inputs, 8**-0.5, tolerance)


@pytest.mark.parametrize(
    ("arguments", "scale"),
    [({"k_channels": 12}, 12**-0.5), ({"softmax_scale": 0.3, "k_channels": 12}, 0.3)],
    ids=["of the width of keys", "given"],
)
def test_scale(one_process, arguments, scale):
    attention = make_attention(**arguments)
    inputs = make_inputs(SHAPES["narrower values, as in mla"], 9, 9, torch.float64)
    assert_same(lambda q, k, v: attention(q, k, v, None), inputs, scale, 1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fewer_queries_than_keys(one_process, shape):
    """As for a chunk in the middle of a sequence: the last query sees every key."""
    attention = make_attention()
    inputs = make_inputs(shape, 5, 15, torch.float64)
    assert_same(lambda *qkv: attention._attend(*qkv).flatten(2), inputs, 8**-0.5, 1e-12)
