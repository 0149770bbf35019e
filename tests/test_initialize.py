"""Initial weights: decided by the seed alone, each kind from its own distribution."""

import math

import pytest
import torch

from gengram_megatron.config.layout import with_gengram

STD, TABLE_STD, LAYERS = 0.02, 0.05, 2
OUTPUT_STD = STD / math.sqrt(2 * LAYERS)


def make_config(attention: str = "gqa", experts: int | None = 4, seed: int = 7):
    from gengram_megatron.config.schema import Config

    return Config.model_validate(
        {
            "run": {"dir": "unused", "seed": seed},
            "model": {
                "hidden_size": 32,
                "num_layers": LAYERS,
                "num_attention_heads": 4,
                "num_query_groups": 2 if attention == "gqa" else None,
                "attention": attention,
                "ffn_hidden_size": 48,
                "num_experts": experts,
                "seq_length": 64,
                "init_std": STD,
                "mla": {
                    "kv_lora_rank": 16,
                    "q_lora_rank": 24,
                    "qk_head_dim": 8,
                    "qk_pos_emb_head_dim": 8,
                    "v_head_dim": 8,
                },
                "gengram": {
                    "enabled": True,
                    "layers": [2],
                    "dim": 16,
                    "init": "scaled",
                    "init_std": TABLE_STD,
                },
            },
            "data": {"path": "unused"},
            "train": {"global_batch_size": 1, "steps": 1, "precision": "fp32"},
        }
    )


def build(config, layout) -> dict[str, torch.Tensor]:
    from gengram_megatron.engine.model.build import build_model

    (chunk,) = build_model(config, with_gengram(layout, config))
    return {name: weight.detach() for name, weight in chunk.named_parameters()}


def std_of(name: str) -> float | None:
    """Standard deviation of a parameter's distribution by its name; None: a norm's weight, all
    ones."""
    if "norm" in name:
        return None
    if ".tables." in name:
        return TABLE_STD
    return OUTPUT_STD if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else STD


KINDS = [("gqa", 4), ("mha", None), ("mla", 4), ("mla", None)]


@pytest.mark.parametrize(("attention", "experts"), KINDS)
def test_each_kind_has_its_standard_deviation(one_process, attention, experts):
    weights = build(make_config(attention, experts), one_process)
    kinds = [
        "embedding",
        "output_layer",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
        "tables.weights.k1",
    ]
    kinds += ["memory.projection", "memory.output", "gate.norm_key", "final_layernorm"]
    kinds += ["kv_up_proj", "q_down_proj", "kv_layernorm"] if attention == "mla" else ["linear_qkv"]
    kinds += ["router"] if experts else []
    assert all(any(kind in name for name in weights) for kind in kinds)
    for name, weight in weights.items():
        std, count = std_of(name), weight.numel()
        if std is None:
            assert (weight == 1).all(), name
            continue
        # Five standard errors of the estimates.
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(count), name
        measured = weight.square().mean().sqrt().item()
        assert abs(measured / std - 1) < 5 / math.sqrt(2 * count), name


def test_the_memory_starts_as_in_the_published_code(one_process):
    """Tables N(0, 1), the other weights uniform by the number of inputs: torch's own modules are
    the reference. Everything outside the memory starts as before."""
    config = make_config()
    scaled = build(config, one_process)
    config.model.gengram.init, config.model.gengram.init_std = "published", None
    published = build(config, one_process)
    hidden, inputs, taps = 32, 6 * 16, 4
    expected = {
        "tables.weights.k6": torch.nn.Embedding(5**6, 16).weight,
        "projection.weight": torch.nn.Linear(inputs, 2 * hidden, bias=False).weight,
        "output.weight": torch.nn.Conv1d(512, 512, taps, groups=512, bias=False).weight,
    }
    for kind, reference in expected.items():
        (weight,) = [w for name, w in published.items() if name.endswith(kind)]
        count = min(weight.numel(), reference.numel())
        ratio = (weight.square().mean() / reference.square().mean()).sqrt().item()
        assert abs(ratio - 1) < 5 / math.sqrt(count), kind
        assert abs(weight.mean().item()) < 5 * reference.std().item() / math.sqrt(count), kind
        if kind != "tables.weights.k6":  # bounded, and both ends are reached
            bound = (inputs if kind == "projection.weight" else taps) ** -0.5
            assert 0.95 * bound < weight.max() <= bound and -bound <= weight.min() < -0.95 * bound
    for name in scaled:
        assert torch.equal(scaled[name], published[name]) != (
            ".memory." in name and ".gate." not in name
        ), name


@pytest.mark.parametrize(("precision", "asked"), [("bf16", True), ("bf16", False), ("fp32", True)])
def test_sums_of_bf16_products_are_as_the_key_says(one_process, precision, asked):
    """The switch is the process's: megatron-core throws it when the model is described."""
    from gengram_megatron.engine.model.build import transformer_config

    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    config = make_config()
    config.train.precision = precision
    config.train.disable_bf16_reduced_precision_matmul = asked
    try:
        matmul.allow_bf16_reduced_precision_reduction = True
        transformer_config(config, one_process)
        thrown = precision == "bf16" and asked
        assert matmul.allow_bf16_reduced_precision_reduction is not thrown
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


@pytest.mark.parametrize(("init", "measured"), [("published", 0.113), ("scaled", 0.0014)])
def test_what_the_memory_adds_at_the_start(one_process, init, measured):
    """measured: on the published code and on ours, at hidden size and d_m 1,024, window 21, and a
    residual stream of rms 0.010. Which DNA and how much of it is not known, hence 10 %; a table,
    map or convolution that starts otherwise is off by several times."""
    from gengram_megatron.engine.model.build import build_model
    from gengram_megatron.engine.model.gengram.ids import KmerIds

    config = make_config(experts=None)
    config.model.hidden_size, config.model.init_std = 1024, 0.01
    config.model.gengram.init, config.model.gengram.init_std = init, None
    config.model.gengram.dim = 1024
    (chunk,) = build_model(config, with_gengram(one_process, config))
    memory, generator = chunk.decoder.layers[1].memory, torch.Generator().manual_seed(0)
    bases = torch.tensor([8, 5, 6, 7])[torch.randint(4, (1, 512), generator=generator)]
    hidden = 0.010 * torch.randn(512, 1, 1024, generator=generator)
    with torch.no_grad():
        added = memory(hidden, KmerIds.from_tokens(bases, memory.shape.tables, [8, 5, 6, 7, 9]))
    assert added.square().mean().sqrt().item() == pytest.approx(measured, rel=0.1)


def test_the_bias_of_key_and_value_starts_as_in_torch_or_at_zero(one_process):
    """published: uniform by the number of inputs, as the bias of nn.Linear. With a bias or without,
    all other weights are the same."""
    config = make_config()
    config.model.gengram.init = "published"
    without = build(config, one_process)
    config.model.gengram.projection_bias = True
    published = build(config, one_process)
    config.model.gengram.init = "scaled"
    scaled = build(config, one_process)
    (name,) = published.keys() - without.keys()
    assert name.endswith("memory.projection.bias")
    assert all(torch.equal(weight, published[other]) for other, weight in without.items())
    assert scaled[name].shape == (2 * 32,) and (scaled[name] == 0).all()
    inputs, bias = 6 * 16, published[name]
    reference = torch.nn.Linear(inputs, 2**16).bias.detach()
    bound = inputs**-0.5
    assert reference.abs().max() == pytest.approx(bound, rel=1e-3)
    assert 0.9 * bound < bias.max() <= bound and -bound <= bias.min() < -0.9 * bound
    ratio = (bias.square().mean() / reference.square().mean()).sqrt().item()
    assert abs(ratio - 1) < 5 / math.sqrt(len(bias))
    assert abs(bias.mean().item()) < 5 * reference.std().item() / math.sqrt(len(bias))
    assert len(bias.unique()) == len(bias)


@pytest.mark.parametrize(("attention", "experts"), KINDS)
def test_every_parameter_is_marked_and_drawn(one_process, attention, experts):
    from gengram_megatron.engine.model.build import build_model
    from gengram_megatron.engine.model.initialize import initialize

    chunks = build_model(
        make_config(attention, experts), with_gengram(one_process, make_config(attention, experts))
    )
    with torch.no_grad():
        for weight in chunks[0].parameters():
            assert hasattr(weight, "init_distribution")
            weight.fill_(float("nan"))
    initialize(chunks, seed=7)
    for name, weight in chunks[0].named_parameters():
        assert weight.isfinite().all(), name


def test_a_parameter_without_a_law_is_an_error(one_process):
    from gengram_megatron.engine.model.build import build_model
    from gengram_megatron.engine.model.initialize import initialize

    chunks = build_model(make_config(), with_gengram(one_process, make_config()))
    del chunks[0].decoder.final_layernorm.weight.init_distribution
    with pytest.raises(AssertionError, match="final_layernorm"):
        initialize(chunks, seed=7)


def test_the_seed_alone_decides(one_process):
    """Two builds are bit-identical whatever was drawn before; another seed changes all weights."""
    torch.manual_seed(1)
    first = build(make_config(seed=7), one_process)
    torch.manual_seed(2)
    second, other = build(make_config(seed=7), one_process), build(make_config(seed=8), one_process)
    for name in first:
        assert torch.equal(first[name], second[name]), name
        if std_of(name) is not None:
            assert not first[name].eq(other[name]).any(), name


def test_bf16_starts_from_the_same_numbers_rounded(one_process):
    config = make_config()
    config.train.precision = "bf16"
    rounded, full = build(config, one_process), build(make_config(), one_process)
    for name, weight in full.items():
        assert rounded[name].dtype == torch.bfloat16, name
        assert torch.equal(rounded[name], weight.bfloat16()), name


@pytest.mark.parametrize("experts", [4, None])
def test_no_two_weights_are_alike(one_process, experts):
    """Each parameter, each expert, each table, gate and up have draws of their own."""
    weights = build(make_config(experts=experts), one_process)
    drawn = [w / std_of(name) for name, w in weights.items() if std_of(name) is not None]
    starts = [part.flatten()[:8] for w in drawn for part in (w if w.dim() > 2 else w.chunk(2))]
    starts = torch.stack([start for start in starts if len(start) == 8])
    assert len(starts) > 20
    alike = (starts[:, None] - starts).abs().amax(-1) < 1e-3
    assert int(alike.sum()) == len(starts)


def test_weights_of_some_layers_are_those_of_the_whole_model(one_process):
    """A weight's draw depends on its own name only: memory added or not, the rest is the same."""
    config = make_config()
    config.model.gengram.enabled = False
    without, with_gengram = build(config, one_process), build(make_config(), one_process)
    assert len(with_gengram) > len(without)
    for name, weight in without.items():
        assert torch.equal(weight, with_gengram[name]), name


@pytest.mark.parametrize("kind", ["std", "bound"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_draw_their_parts_of_one_tensor(one_process, axis, ranks, kind):
    """Here for tables and experts cut into equal parts; whole models are in the layout tests."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from gengram_megatron.engine.model.initialize import InitDistribution, _draw_local_part

    distribution = InitDistribution(**{kind: 1.0})
    shape = [8, 12]
    shape[axis] //= ranks

    def part(rank: int, expert: int) -> torch.Tensor:
        data = torch.empty(shape)
        cut = (axis + 1, rank, ranks)
        sharded = ShardedTensor.from_rank_offsets(
            "name", data, (0, expert, 4), cut, prepend_axis_num=1
        )
        return _draw_local_part(sharded, distribution, seed=7)

    def whole(expert: int) -> torch.Tensor:
        sharded = ShardedTensor.from_rank_offsets(
            "name", torch.empty(8, 12), (0, expert, 4), prepend_axis_num=1
        )
        return _draw_local_part(sharded, distribution, seed=7)

    for expert in range(4):
        together = torch.cat([part(rank, expert) for rank in range(ranks)], axis)
        assert torch.equal(together, whole(expert))
    assert not torch.equal(whole(0), whole(1))


def test_large_tensors_are_drawn_in_blocks_that_ranks_agree_on(one_process, monkeypatch):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from gengram_megatron.engine.model import initialize

    def draw(first: int, last: int) -> torch.Tensor:
        part = ShardedTensor(
            key="table",
            data=torch.empty(last - first, 3),
            dtype=torch.float32,
            local_shape=(last - first, 3),
            global_shape=(50, 3),
            global_offset=(first, 0),
            axis_fragmentations=None,
        )
        return initialize._draw_local_part(part, initialize.InitDistribution(std=STD), seed=1)

    monkeypatch.setattr(initialize, "LARGEST_DRAW", 24)  # eight rows
    whole = draw(0, 50)
    assert whole.std() == pytest.approx(STD, rel=0.2)
    assert len(whole.unique()) == whole.numel()  # no block repeats another
    for first, last in [(0, 50), (3, 5), (7, 17), (24, 32), (40, 50)]:
        assert torch.equal(draw(first, last), whole[first:last])
