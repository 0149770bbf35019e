"""configs/genos/README.md: every flag of the published launches is there, with a key that exists
and has the launch's value."""

import re
from dataclasses import dataclass

import pytest

from gengram_megatron.config.keys import Keys
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tree import flattened
from tests.plan.configs import CONFIGS, load

# All that the three scripts give Megatron-LM.
TEXT_OF_FLAGS = """
use-mcore-models disable-bias-linear seq-length max-position-embeddings num-layers hidden-size
ffn-hidden-size moe-ffn-hidden-size num-attention-heads init-method-std attention-dropout
hidden-dropout normalization position-embedding-type swiglu untie-embeddings-and-output-weights
group-query-attention num-query-groups no-masked-softmax-fusion no-position-embedding rotary-base
gengram-enabled gengram-layer-ids gengram-ngram-sizes gengram-embed-dim-per-ngram gengram-token-ids
gengram-use-short-conv gengram-short-conv-kernel-size gengram-window-size
num-experts moe-router-topk moe-router-load-balancing-type moe-aux-loss-coeff moe-grouped-gemm
moe-token-dispatcher-type overlap-param-gather overlap-grad-reduce moe-router-dtype
moe-z-loss-coeff moe-permute-fusion
num-workers dataloader-type tokenizer-type tokenizer-model data-path data-cache-path split
no-create-attention-mask-in-dataloader
micro-batch-size global-batch-size lr train-samples lr-decay-samples lr-decay-style min-lr
weight-decay lr-warmup-fraction clip-grad bf16 use-flash-attn attention-softmax-in-fp32
accumulate-allreduce-grads-in-fp32 disable-bf16-reduced-precision-matmul
tensor-model-parallel-size pipeline-model-parallel-size expert-model-parallel-size
context-parallel-size sequence-parallel use-distributed-optimizer
moe-per-layer-logging log-interval save-interval eval-interval eval-iters save tensorboard-dir
no-load-optim no-load-rng wandb-project wandb-exp-name log-throughput
"""
FLAGS = TEXT_OF_FLAGS.split()
MODELS = ("genos/genos_1.2b", "genos/genos_10b", "genos/gengram_10b")
WORDS = ("always so", "no effect", "not offered")
README = CONFIGS / "genos/README.md"


@dataclass(frozen=True)
class Row:
    """One flag, its value in the launch of each model, and what stands for it here."""

    flag: str
    values: tuple[str, ...]
    here: str


def rows() -> list[Row]:
    lines = [line for line in README.read_text().splitlines() if line.startswith("| `--")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 5 for row in cells)
    return [Row(flag.strip("`-"), tuple(values), here) for flag, *values, here in cells]


def keys_in(text: str) -> list[str]:
    return [word for word in re.findall(r"`([^`]+)`", text) if re.fullmatch(r"[a-z0-9_.]+", word)]


def is_key(name: str) -> bool:
    return any(key.name == name for key in Keys(Config).named(name))


def test_every_flag_has_one_row() -> None:
    assert sorted(row.flag for row in rows()) == sorted(FLAGS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.flag)
def test_a_row_names_keys_that_exist_or_says_why_there_is_none(row: Row) -> None:
    keys = keys_in(row.here)
    assert all(map(is_key, keys)), keys
    assert keys or row.here.startswith(WORDS) or row.flag == "split"


def test_all_keys_in_the_text_exist() -> None:
    words = [word for line in README.read_text().splitlines() for word in keys_in(line)]
    keys = [word for word in words if "." in word and not word.endswith(".yaml")]
    assert len(keys) > 50
    assert [key for key in keys if not is_key(key)] == []


ALONE = [row for row in rows() if re.fullmatch(r"`[^`]+`", row.here)]


def as_number(cell: str) -> float | list[float] | bool | None:
    """A cell of the table as the value of a key; None where the flag is not given."""
    if cell in ("–", "yes"):
        return cell == "yes" or None
    numbers = [float(word) for word in cell.split()]
    return numbers[0] if len(numbers) == 1 else numbers


@pytest.mark.parametrize("row", ALONE, ids=lambda row: row.flag)
@pytest.mark.parametrize("name", MODELS)
def test_a_key_on_its_own_has_the_value_of_the_launch(name: str, row: Row) -> None:
    value = as_number(row.values[MODELS.index(name)])
    config = load(name)
    if row.flag.startswith("gengram-") and not config.model.gengram.enabled:
        assert value is None
        return
    if value is None:  # Megatron-LM's default
        value = 1 if row.flag.endswith("-size") else False
    assert flattened(config.model_dump())[keys_in(row.here)[0]] == value


def test_values_are_compared() -> None:
    assert len(ALONE) >= 30
    assert {"rotary-base", "gengram-layer-ids", "overlap-grad-reduce"} <= {r.flag for r in ALONE}


@pytest.mark.parametrize(
    "flag, key, values",
    [
        ("moe-ffn-hidden-size", "model.ffn_hidden_size", (4096, 8192, 8192)),
        ("group-query-attention", "model.attention", ("gqa", "gqa", "gqa")),
        ("gengram-use-short-conv", "model.gengram.output", ("convolution",) * 3),
        ("train-samples", "train.samples", (195_312_500, 268_554_687, 25_066_252)),
        ("lr-decay-samples", "optimizer.decay_fraction", (0.8, 0.8, 0.8)),
        ("lr-warmup-fraction", "optimizer.warmup_fraction", (0.08, 0.04, 0.04)),
        ("bf16", "train.precision", ("bf16", "bf16", "bf16")),
        ("pipeline-model-parallel-size", "parallel.pipeline", (1, 2, 2)),
        ("expert-model-parallel-size", "parallel.expert", (1, 2, 1)),
        ("sequence-parallel", "parallel.sequence", (None, None, None)),
        ("log-interval", "logging.interval", (10, 10, 10)),
        ("eval-interval", "train.validation_interval", (None, None, None)),
        ("eval-iters", "train.validation_samples", (4096, 4096, 4096)),
    ],
)
def test_keys_with_a_note_have_the_value_that_it_gives(flag: str, key: str, values: tuple) -> None:
    [row] = [row for row in rows() if row.flag == flag]
    assert key in keys_in(row.here)
    assert tuple(flattened(load(name).model_dump())[key] for name in MODELS) == values
