"""What only a GPU can show: bf16 on its kernels against float64, memory, determinism, resuming.

`bash scripts/gpu_check.sh` runs them. Sizes and slow references are those of the CPU's tests.
"""

import json
import shutil
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gengram_megatron.config.layout import with_gengram
from gengram_megatron.plan.time import PEAK_BF16_FLOPS
from tests.exchange_models import load
from tests.observed import KINDS, observe, same_model
from tests.test_attention import SHAPES, make_attention, make_inputs
from tests.test_experts import COUNTS, HIDDEN, close, make_experts, one_after_the_other
from tests.test_flops import make_config
from tests.test_gengram_pooling import (
    SIZES,
    WINDOW,
    error,
    exact_mean,
    kmer_ids,
    make_table,
    mean_and_gradient,
    random_dna,
)
from tests.test_platform import SNAPSHOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROOT = Path(__file__).parents[1]
ROUNDING = 2e-2
"""Relative error, by norm, that a few products in bf16 may have."""


def leaf(x: Tensor) -> Tensor:
    return x.detach().cuda().requires_grad_()


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@pytest.mark.parametrize("length", [8_192, 32_768])
def test_pooled_features_and_table_gradients_are_as_good_as_rounding(length):
    from gengram_megatron.engine.model.sequence import TokenRange

    for k, ids in zip(SIZES, kmer_ids(random_dna(length).cuda())):
        table = make_table(k, torch.bfloat16).cuda()
        upstream = noise((length, 1, table.shape[1]), 1).bfloat16()
        ours = mean_and_gradient(table, ids, k, WINDOW, [TokenRange(0, length)], upstream)
        exact_table = leaf(table.double())
        exact = exact_mean(exact_table, ids, WINDOW - k + 1)
        exact.backward(upstream[:, 0].double())
        for mine, right in ((ours[0][:, 0], exact), (ours[1], exact_table.grad)):
            assert mine.dtype == torch.bfloat16
            assert error(mine, right) <= 2 * error(right.bfloat16(), right)


@pytest.mark.parametrize("length", [1_024, 8_192])
def test_table_gradients_are_deterministic(length):
    from gengram_megatron.engine.model.sequence import TokenRange

    ids_of_k = kmer_ids(torch.cat([random_dna(length, seed) for seed in (1, 2)]).cuda())
    upstream = noise((length, 2, 1024), 1).bfloat16()
    for k, ids in zip(SIZES, ids_of_k):
        table = make_table(k, torch.bfloat16, dim=1024).cuda()
        (_, first), (_, second) = (
            mean_and_gradient(table, ids, k, WINDOW, [TokenRange(0, length)], upstream)
            for _ in range(2)
        )
        assert torch.equal(first, second)


def make_memory(layout, precision: str):
    """The memory of a built layer, with random weights that make every part of it matter."""
    from gengram_megatron.engine.model.build import build_model

    config = make_config(hidden_size=256, gengram={"enabled": True, "layers": [1], "dim": 64})
    config.train.precision = precision
    memory = build_model(config, with_gengram(layout, config))[0].decoder.layers[0].memory
    with torch.no_grad():
        for seed, (name, weight) in enumerate(memory.named_parameters()):
            weight.copy_(noise(weight.shape, seed) * 0.1 + (1 if "norm" in name else 0))
    return memory


def memory_results(memory, hidden: Tensor, kmers, upstream: Tensor) -> dict[str, Tensor]:
    """The output and every gradient, on the CPU."""
    memory.zero_grad(set_to_none=True)
    hidden = hidden.detach().requires_grad_()
    out = memory(hidden, kmers)
    out.backward(upstream)
    gradients = {name: weight.grad for name, weight in memory.named_parameters()}
    return {
        n: x.detach().cpu() for n, x in {"out": out, "hidden": hidden.grad, **gradients}.items()
    }


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", ROUNDING)])
def test_memory_against_float64_on_the_cpu(one_process, precision, tolerance):
    from gengram_megatron.config.tables import direct_table
    from gengram_megatron.engine.model.gengram.ids import KmerIds
    from gengram_megatron.tokenizer import BASE_IDS

    tokens, shape = random_dna(2048), (2048, 1, 256)
    tables = tuple(direct_table(k, 1) for k in SIZES)
    kmers, on_cpu = (
        KmerIds.from_tokens(t, tables, list(BASE_IDS)) for t in (tokens.cuda(), tokens)
    )
    memory = make_memory(one_process, precision)
    dtype = memory.projection.weight.dtype
    upstream, keys = noise(shape, 2).to(dtype), []
    memory.projection.register_forward_hook(lambda _, __, outputs: keys.append(outputs[0]))
    memory(torch.ones_like(upstream), kmers)
    # Hidden states that agree with the key: where they do not, the slope of the gate's square
    # root has a pole, and rounding alone moves gradients.
    hidden = keys[0].detach() + (noise(shape, 1) * keys[0].std()).to(dtype)

    first, second = (memory_results(memory, hidden, kmers, upstream) for _ in range(2))
    exact = memory_results(
        memory.cpu().double(), hidden.cpu().double(), on_cpu, upstream.cpu().double()
    )
    for name, right in exact.items():
        assert torch.equal(first[name], second[name]), f"{name} is not deterministic"
        assert error(first[name], right) <= tolerance, name


def exact_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [s, b, heads, d], key and value [t, b, groups, d]; the last query sees all keys."""
    heads_a_group = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(heads_a_group, dim=2) for x in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    seen = torch.ones_like(scores).tril(len(key) - len(query)).bool()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhst,tbhd->sbhd", weights, value)


@pytest.mark.parametrize(("queries", "keys"), [(301, 301), (129, 387)], ids=["square", "end"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_against_float64(one_process, shape, queries, keys):
    """Also for fewer queries than keys, as under context parallelism."""
    attention = make_attention()
    ours = [leaf(x) for x in make_inputs(shape, queries, keys, torch.bfloat16)]
    exact = [leaf(x.double()) for x in ours]
    out, expected = attention._attend(*ours), exact_attention(*exact, attention.scale)
    upstream = noise(out.shape, 1).bfloat16()
    out.backward(upstream)
    expected.backward(upstream.double())
    assert close(out, expected, ROUNDING)
    assert all(close(mine.grad, right.grad, ROUNDING) for mine, right in zip(ours, exact))


@pytest.mark.parametrize("queries", [32_768, 16_384], ids=["square", "end"])
def test_attention_keeps_no_scores(one_process, queries):
    """Forward and backward at 32k take far less than the scores of a single head."""
    keys, heads, groups, width = 32_768, 16, 8, 64
    attention = make_attention()
    query, key, value = (
        leaf(torch.randn((length, 1, n, width), dtype=torch.bfloat16))
        for length, n in ((queries, heads), (keys, groups), (keys, groups))
    )
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention._attend(query, key, value).sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < 2 * queries * keys, f"{taken / 1e9:.2f} GB"


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "counts", [*COUNTS.values(), [129, 0, 257, 63]], ids=[*COUNTS, "many and odd"]
)
def test_experts_against_a_loop(one_process, counts, recompute):
    experts, total = make_experts(torch.bfloat16, recompute), sum(counts)
    tokens, probs = leaf(noise((total, HIDDEN), 1).bfloat16()), leaf(noise((total,), 2).sigmoid())
    ours = [tokens, probs, experts.linear_fc1.weight, experts.linear_fc2.weight]
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]
    upstream = noise((total, HIDDEN), 3).bfloat16()

    out, _ = experts(tokens, torch.tensor(counts), probs)
    expected = one_after_the_other(exact[0], counts, *exact[1:])
    out.backward(upstream)
    expected.backward(upstream.cpu().double())
    assert close(out.cpu(), expected, 2 * ROUNDING)
    for mine, right in zip(ours, exact):
        right = torch.zeros_like(right) if right.grad is None else right.grad
        assert close(mine.grad.cpu(), right, 2 * ROUNDING)


@pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_transformer_engine_computes_what_torch_computes(one_process, tmp_path, kind, recompute):
    """The library itself; on the CPU there is only a stand-in of it."""
    words = (*KINDS[kind], "train.precision=bf16", f"train.recompute={recompute}")
    own = "model.implementation=transformer_engine"
    found, expected = (observe(load(tmp_path, "run", *words, *more)) for more in ((own,), ()))
    assert found["parts"]["attention"] == "Transformer Engine (DotProductAttention)"
    same_model(found, expected, tolerance=0.1)


def train(folder: Path, data: Path) -> list[dict]:
    """Five steps of the smoke run on one GPU, a checkpoint after the third; its metrics."""
    words = [f"run.dir={folder}", f"data.path={data}", "train.steps=5", "checkpoint.interval=3"]
    words += [
        "checkpoint.keep=null",
        "train.validation_interval=null",
        "train.validation_samples=16",
    ]
    command = ["-m", "gengram_megatron", "train", "configs/smoke/one_gpu.yaml", *words]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_is_bit_identical(tmp_path):
    data = ROOT / "datasets/sample"
    if not data.exists():
        pytest.skip("needs datasets/sample: gengram-data build configs/data/sample.yaml")
    whole = train(tmp_path / "whole", data)
    name = "checkpoints/step_00000003"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    resumed = train(tmp_path / "resumed", data)
    expected = [entry["loss"] for entry in whole if entry["step"] > 3]
    losses = [entry["loss"] for entry in resumed]
    assert losses[0] == expected[0], "the state was not restored"
    assert losses == expected, "the state was restored, but a kernel is not deterministic"
    for entry in (entry for entry in whole if entry["kind"] == "train"):
        assert 0 < entry["peak_memory_bytes"] < torch.cuda.get_device_properties(0).total_memory
        known = torch.cuda.get_device_name() in PEAK_BF16_FLOPS
        assert ("model_flops_utilisation" in entry) == known
        assert 0 < entry.get("model_flops_utilisation", 0.5) < 1


def test_prepare_replaces_nothing():
    code = """
        import torch
        assert torch.cuda.is_available()
        before = snapshot()
        from gengram_megatron.engine.platform import prepare
        prepare()
        import gengram_megatron.engine.model.build
        assert replaced(before) == [], replaced(before)
    """
    program = "\n".join(map(textwrap.dedent, (SNAPSHOT, code)))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
