"""The Gengram module against the slow float64 loop of reference_gengram.py: every k, every
position, what is not a base, windows that reach before the sequence, and every gradient."""

import pytest
import torch

from tests.reference_gengram import PUBLISHED, Options, gengram, rows_in_window

ALPHABET = [8, 5, 6, 7, 9]  # A C G T N
A, C, G, T, N, PAD, UNK, EOD = *ALPHABET, 0, 1, 12
ALL_SIZES = (1, 2, 3, 4, 5, 6)
HIDDEN, DIM, KERNEL = 12, 4, 4


def bases(length: int, seed: int, of: tuple[int, ...] = (A, C, G, T)) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [of[i] for i in torch.randint(len(of), (length,), generator=generator)]


def random_rows(length: int) -> list[list[int]]:
    return [bases(length, 1), bases(length, 2)]


TEXTS = {
    "bases": random_rows(48),
    "bases and all other tokens": [
        bases(48, 3, (A, C, G, T) * 5 + (N, EOD)),
        bases(48, 4, (A, C, G, T) * 3 + (N, PAD, UNK, EOD)),
    ],
    "runs of N": [
        bases(10, 5) + [N] * 24 + bases(14, 6),
        [N] * 9 + bases(30, 7) + [N] * 9,
    ],
    "EOD in the middle, PAD at the end": [
        [*bases(20, 8), EOD, *bases(27, 9)],
        bases(30, 10) + [EOD] + [PAD] * 17,
    ],
    "repeats": [[A] * 48, [C, G] * 24],
    "shorter than the window": random_rows(5),
    "shorter than most k": random_rows(3),
    "one token": [[A], [EOD]],
    "nothing valid": [[EOD] * 8, [PAD] * 8],
}
WINDOWS = [None, 6, 21, 30]


PROJECT = pytest.mark.parametrize("project", ["features", "tables"])


def make_memory(
    kmer_sizes,
    window,
    dtype,
    scale: float = 1.0,
    options=PUBLISHED,
    project="features",
    bias=False,
):
    """A module with random weights that make every part of it matter."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from gengram_megatron.config.tables import Placement, direct_table
    from gengram_megatron.engine.model.gengram.memory import GengramMemory
    from gengram_megatron.engine.model.gengram.shape import GengramShape
    from gengram_megatron.engine.model.initialize import InitDistribution, init_tag

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        layernorm_epsilon=1e-5,
        params_dtype=dtype,
        init_method=init_tag(InitDistribution(std=1.0)),
    )
    shape = GengramShape(
        tuple(Placement(direct_table(k, DIM), None, "") for k in kmer_sizes),
        DIM,
        window,
        KERNEL,
        init="scaled",
        init_std=1.0,
        deduplicate=options.deduplicate,
        signed_sqrt=options.signed_sqrt,
        output=options.output,
        project=project,
        projection_bias=bias,
    )
    memory = GengramMemory(config, shape, ProcessGroupCollection.use_mpu_process_groups())
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in memory.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values)
        memory.gate.norm_hidden.weight.mul_(scale)
    return memory


def make_hidden(length: int, batch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(12)
    return torch.randn((length, batch, HIDDEN), generator=generator, dtype=torch.float64)


def add_to(memory, hidden, text, eod=None):
    from gengram_megatron.engine.model.gengram.ids import KmerIds

    tokens = torch.tensor(text, dtype=torch.uint8)
    return memory(hidden, KmerIds.from_tokens(tokens, memory.shape.tables, ALPHABET, eod))


def output_weight(memory) -> torch.Tensor | None:
    """The weight of the output's convolution or norm; None for a plain output."""
    return next(memory.output.parameters(), None)


def module_results(memory, text, eod=None) -> dict[str, torch.Tensor]:
    """The output, and the gradients of the sum of its squares, under the reference's names."""
    dtype = memory.projection.weight.dtype
    hidden = make_hidden(len(text[0]), len(text)).to(dtype).requires_grad_()
    out = add_to(memory, hidden, text, eod)
    out.square().sum().backward()
    memory.finish_gradients()
    key, value = memory.projection.weight.grad.flatten(2)
    biases = {}
    if memory.projection.bias is not None:
        biases["key's bias"], biases["value's bias"] = memory.projection.bias.grad.chunk(2)
    return {
        "output": out.detach(),
        "hidden": hidden.grad,
        **{f"table {k}": memory.tables.weights[f"k{k}"].grad for k in memory.shape.kmer_sizes},
        "key": key,
        "value": value,
        **biases,
        "norm of hidden": memory.gate.norm_hidden.weight.grad,
        "norm of key": memory.gate.norm_key.weight.grad,
        **(
            {"output weight": output_weight(memory).grad}
            if output_weight(memory) is not None
            else {}
        ),
    }


def reference_results(memory, text, options=PUBLISHED) -> dict[str, torch.Tensor]:
    """The same from the reference, with the module's weights in float64."""
    dtype = memory.projection.weight.dtype

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().double().requires_grad_()

    hidden = leaf(make_hidden(len(text[0]), len(text)).to(dtype))
    tables = {k: leaf(memory.tables.weights[f"k{k}"]) for k in memory.shape.kmer_sizes}
    key, value = (leaf(half) for half in memory.projection.weight.flatten(2))
    biases = {}
    if memory.projection.bias is not None:
        key_bias, value_bias = (leaf(half) for half in memory.projection.bias.chunk(2))
        biases = {"key_bias": key_bias, "value_bias": value_bias}
    norm_hidden, norm_key = leaf(memory.gate.norm_hidden.weight), leaf(memory.gate.norm_key.weight)
    weight = output_weight(memory)
    taps = None if weight is None else leaf(weight)
    out = gengram(
        hidden,
        text,
        tables,
        key,
        value,
        norm_hidden,
        norm_key,
        taps,
        ALPHABET,
        memory.shape.window,
        options,
        **biases,
    )
    out.square().sum().backward()
    return {
        "output": out.detach(),
        "hidden": hidden.grad,
        **{f"table {k}": table.grad for k, table in tables.items()},
        "key": key.grad,
        "value": value.grad,
        **{name.replace("_", "'s "): bias.grad for name, bias in biases.items()},
        "norm of hidden": norm_hidden.grad,
        "norm of key": norm_key.grad,
        **({} if taps is None else {"output weight": taps.grad}),
    }


def assert_same(ours: dict, expected: dict, tolerance: float, of_output: float | None = None):
    """Every tensor within a relative error, by norm; where nothing is expected, exactly nothing."""
    for name, right in expected.items():
        allowed = of_output if of_output and name == "output" else tolerance
        distance = (ours[name].double() - right).norm().item()
        assert distance <= allowed * right.norm().item(), name


@PROJECT
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("window", WINDOWS)
def test_output_and_every_gradient(one_process, window, text, project):
    memory = make_memory(ALL_SIZES, window, torch.float64, project=project)
    assert_same(module_results(memory, text), reference_results(memory, text), 1e-10)


NOTHING_AT_FIRST = [[EOD] * 7 + bases(33, 16), [N] * 4 + [PAD] * 30 + bases(6, 17)]


@PROJECT
@pytest.mark.parametrize("options", [PUBLISHED, Options(output="norm"), Options(eod=EOD)], ids=str)
@pytest.mark.parametrize(
    "text", [NOTHING_AT_FIRST, TEXTS["runs of N"], TEXTS["one token"], TEXTS["nothing valid"]]
)
@pytest.mark.parametrize("window", [None, 21])
def test_bias_of_key_and_value(one_process, window, text, options, project):
    """Where a window holds nothing that is valid, key and value are the bias alone."""
    memory = make_memory(
        ALL_SIZES, window, torch.float64, options=options, project=project, bias=True
    )
    expected = reference_results(memory, text, options)
    assert {"key's bias", "value's bias"} <= expected.keys()
    assert_same(module_results(memory, text, options.eod), expected, 1e-10)


@PROJECT
def test_bias_is_there_only_where_it_is_asked_for(one_process, project):
    """It has one axis, by which megatron-core knows that it does not decay. Without it, nothing is
    added where no k-mer is valid; with it, the output is its value through the gate."""
    text = TEXTS["nothing valid"]
    without = make_memory(ALL_SIZES, 21, torch.float64, project=project)
    memory = make_memory(ALL_SIZES, 21, torch.float64, project=project, bias=True)
    assert "projection.bias" not in dict(without.named_parameters())
    assert dict(memory.named_parameters())["projection.bias"].shape == (2 * HIDDEN,)
    hidden = make_hidden(8, 2)
    assert (add_to(without, hidden, text) == 0).all()
    assert (add_to(memory, hidden, text) != 0).all()


@pytest.mark.parametrize("text", ["bases and all other tokens", "shorter than most k"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kmer_sizes", [(1,), (6,), (2, 4)], ids=str)
def test_some_sizes_only(one_process, kmer_sizes, window, text):
    memory = make_memory(kmer_sizes, window, torch.float64)
    assert_same(module_results(memory, TEXTS[text]), reference_results(memory, TEXTS[text]), 1e-10)


@pytest.mark.parametrize("window", [None, 3, 21])
@pytest.mark.parametrize("kmer_sizes", [(1,), (1, 2), (1, 2, 3)], ids=str)
def test_projected_tables_of_fewer_sizes(one_process, kmer_sizes, window):
    text = TEXTS["bases and all other tokens"]
    memory = make_memory(kmer_sizes, window, torch.float64, project="tables")
    assert_same(module_results(memory, text), reference_results(memory, text), 1e-10)


OPTIONS = {
    "distinct k-mers": Options(deduplicate=True),
    "no signed square root": Options(signed_sqrt=False),
    "norm output": Options(output="norm"),
    "plain output": Options(output="plain"),
    "documents": Options(eod=EOD),
    "documents, distinct k-mers": Options(deduplicate=True, eod=EOD),
    "the paper's equations": Options(deduplicate=True, signed_sqrt=False, output="norm"),
}


@pytest.mark.parametrize("text", ["bases and all other tokens", "repeats", "shorter than most k"])
@pytest.mark.parametrize("window", [None, 6, 21])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(one_process, options, window, text):
    memory = make_memory(ALL_SIZES, window, torch.float64, options=options)
    expected = reference_results(memory, TEXTS[text], options)
    assert_same(module_results(memory, TEXTS[text], options.eod), expected, 1e-10)
    if not options.deduplicate:
        memory = make_memory(ALL_SIZES, window, torch.float64, options=options, project="tables")
        assert_same(module_results(memory, TEXTS[text], options.eod), expected, 1e-10)


@pytest.mark.parametrize("name", ["distinct k-mers", "documents"])
def test_options_change_the_answer(one_process, name):
    """So that the comparison above could fail."""
    text, options = TEXTS["bases and all other tokens"], OPTIONS[name]
    plain = add_to(make_memory(ALL_SIZES, 21, torch.float64), make_hidden(48, 2), text)
    memory = make_memory(ALL_SIZES, 21, torch.float64, options=options)
    assert not torch.allclose(plain, add_to(memory, make_hidden(48, 2), text, options.eod))


@PROJECT
@pytest.mark.parametrize("window", WINDOWS)
def test_in_float32(one_process, window, project):
    """The signed square root is steep near zero, so gradients through it round more."""
    text = TEXTS["bases and all other tokens"]
    memory = make_memory(ALL_SIZES, window, torch.float32, project=project)
    expected = reference_results(memory, text)
    assert_same(module_results(memory, text), expected, tolerance=1e-4, of_output=1e-5)


def test_projected_tables_add_up_the_microbatches_of_a_step_and_follow_the_weights(one_process):
    """Two microbatches in blocks and pieces of their own, then a step, then another microbatch."""
    memories = [
        make_memory(ALL_SIZES, 21, torch.float64, project=p, bias=True)
        for p in ("features", "tables")
    ]
    found = []
    for memory in memories:
        out = []
        for _ in range(2):
            for seed in (20, 21):
                text = [bases(300, seed, (A, C, G, T) * 9 + (N, EOD))]
                out.append(add_to(memory, make_hidden(300, 1), text))
                out[-1].square().sum().backward()
            memory.finish_gradients()
            with torch.no_grad():
                for parameter in memory.parameters():
                    parameter -= 1e-3 * parameter.grad
        found.append([*out, *(p.grad for p in memory.parameters())])
    for features, tables in zip(*found):
        assert_same({"": tables}, {"": features.detach()}, 1e-9)


def test_a_gate_that_hardly_opens(one_process):
    """Agreement below the floor of 1e-6 counts as the floor, with its sign and no gradient."""
    text = TEXTS["bases"]
    memory = make_memory(ALL_SIZES, 21, torch.float64, scale=1e-9)
    ours = module_results(memory, text)
    assert_same(ours, reference_results(memory, text), 1e-10)
    assert (ours["norm of key"] == 0).all() and (ours["hidden"] == 0).all()


@PROJECT
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_that_no_token_touched_have_no_gradient(one_process, window, dtype, project):
    text = TEXTS["bases and all other tokens"]
    memory = make_memory(ALL_SIZES, window, dtype, project=project)
    gradients = module_results(memory, text)
    for k in ALL_SIZES:
        touched = {
            row
            for tokens in text
            for position in range(len(tokens))
            for row in rows_in_window(tokens, position, k, window, ALPHABET)
        }
        with_gradient = gradients[f"table {k}"].ne(0).any(dim=1).nonzero().flatten().tolist()
        assert set(with_gradient) == touched


@pytest.mark.parametrize("window", WINDOWS)
def test_a_token_reaches_its_window_and_the_convolution_but_nothing_before_it(one_process, window):
    """Changed, it changes the positions in whose windows it lies, and those 6, 12 and 18 later."""
    text = bases(96, 13)
    memory = make_memory(ALL_SIZES, window, torch.float64)
    hidden, place = make_hidden(96, 1), 40
    changed = [*text[:place], EOD, *text[place + 1 :]]
    before, after = (add_to(memory, hidden, [row]) for row in (text, changed))
    differs = before.ne(after).any(dim=-1).flatten().nonzero().flatten().tolist()
    windows = range(place, place + (window or max(ALL_SIZES)))
    assert differs == sorted({p + 6 * tap for p in windows for tap in range(KERNEL)})


def test_a_hidden_state_reaches_itself_and_the_taps_of_the_convolution(one_process):
    text = [bases(64, 14)]
    memory = make_memory(ALL_SIZES, 21, torch.float64)
    hidden = make_hidden(64, 1)
    changed = hidden.clone()
    changed[30] *= -2
    before, after = (add_to(memory, x, text) for x in (hidden, changed))
    differs = before.ne(after).any(dim=-1).flatten().nonzero().flatten().tolist()
    assert differs == [30, 36, 42, 48]


def features_of(tables, weights: list[torch.Tensor], text) -> torch.Tensor:
    """The pooled features of the package, [s, b, number of k * d]."""
    from gengram_megatron.engine.model.gengram.ids import KmerIds
    from gengram_megatron.engine.model.gengram.pooling import Pooling, pooled_features
    from gengram_megatron.engine.model.sequence import TokenRange

    kmers = KmerIds.from_tokens(torch.tensor(text), tables, ALPHABET)
    return pooled_features(
        weights, list(kmers.ids), tables, Pooling(21), [TokenRange(0, len(text[0]))], None
    )


def random_tables(tables) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(15)
    return [
        torch.randn(t.rows, t.columns, generator=generator, dtype=torch.float64) for t in tables
    ]


def test_shared_rows_are_those_of_a_direct_table_with_equal_rows(one_process):
    """A direct table in which each k-mer has a copy of its pair's row gives the same features."""
    from gengram_megatron.config.tables import direct_table
    from gengram_megatron.engine.model.gengram.ids import KmerIds

    text = TEXTS["bases and all other tokens"]
    shared, plain = ((direct_table(k, DIM, s),) for s in (True, False) for k in (4,))
    (weight,) = random_tables(shared)
    expanded = torch.zeros(5**4, DIM, dtype=torch.float64)
    kmers = [
        KmerIds.from_tokens(torch.tensor(text), tables, ALPHABET).ids[0]
        for tables in (shared, plain)
    ]
    for pair, row in zip(*(ids.flatten().tolist() for ids in kmers)):
        if row < 5**4:
            expanded[row] = weight[pair]
    ours, expected = features_of(shared, [weight], text), features_of(plain, [expanded], text)
    assert torch.equal(ours, expected) and ours.abs().sum() > 0


def test_heads_of_a_hashed_size_are_interleaved_window_means(one_process):
    """Position by position: column c of head j is column 2 c + j of the features."""
    from gengram_megatron.config.schema import Gengram
    from gengram_megatron.config.tables import kmer_tables
    from gengram_megatron.engine.model.gengram.ids import KmerIds

    text = TEXTS["bases and all other tokens"]
    tables = kmer_tables(Gengram(kmer_sizes=[9], dim=DIM, hashing={"rows": 100, "heads": 2}))
    weights = random_tables(tables)
    ours = features_of(tables, weights, text)
    ids = KmerIds.from_tokens(torch.tensor(text), tables, ALPHABET).ids
    for head, (table, weight) in enumerate(zip(tables, weights)):
        for b, position in ((b, p) for b in range(2) for p in range(len(text[0]))):
            window = ids[head][b, max(position - 21 + 9, 0) : position + 1]
            rows = [row for row in window.tolist() if row < table.rows]
            mean = weight[rows].sum(0) / max(len(rows), 1)
            torch.testing.assert_close(ours[position, b, head::2], mean)
