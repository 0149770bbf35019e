"""What train.engine deepspeed cannot be combined with is refused in a sentence; what it needs of a
rank is planned."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import placements
from gengram_megatron.errors import UserError
from gengram_megatron.plan import plan
from gengram_megatron.plan.time import Speed
from tests.training.tiny import DENSE, environment, write_config

ENGINE = "train.engine=deepspeed"

# Number of processes, words, and what the sentence must say.
REFUSED = {
    "pipeline": (2, ["parallel.pipeline=2"], "parallel.pipeline is 2, which train.engine deepspeed does not support: set parallel.pipeline to 1, or engine to megatron"),
    "interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"], "parallel.pipeline is 2, which train.engine deepspeed does not support"),
    "tensor, weights shared": (2, ["parallel.tensor=2", "train.deepspeed.zero_stage=3"], "train.deepspeed.zero_stage is 3 with parallel.tensor 2, which train.engine deepspeed does not support: set train.deepspeed.zero_stage to 2, or engine to megatron"),
    "expert, weights shared": (2, ["parallel.expert=2", "train.deepspeed.zero_stage=3"], "train.deepspeed.zero_stage is 3 with parallel.expert 2, which train.engine deepspeed does not support: set train.deepspeed.zero_stage to 2"),
    "expert tensor, weights shared": (2, ["parallel.expert_tensor=2", "train.deepspeed.zero_stage=3"], "train.deepspeed.zero_stage is 3 with parallel.expert_tensor 2, which"),
    "rows": (2, ["model.gengram.split=rows"], "model.gengram.split is rows, which"),
    "projected tables": (2, ["model.gengram.project=tables"], "model.gengram.project is tables, but train.engine is deepspeed: set it to megatron, or set project to features"),
    "whole states": (2, ["optimizer.distributed=false"], "optimizer.distributed is false, which"),
    "reduction": (2, ["optimizer.overlap_grad_reduce=true"], "optimizer.overlap_grad_reduce is true, which"),
    "weights in host memory": (2, ["train.deepspeed.offload_parameters=true"], "train.deepspeed.offload_parameters is true with zero_stage 1, which keeps all weights on every rank: set zero_stage to 3"),
    "batch": (2, ["train.deepspeed.extra={train_batch_size: 4}"], "train.deepspeed.extra has train_batch_size, which train.global_batch_size decides: remove it"),
    "precision": (2, ["train.deepspeed.extra.bf16.enabled=true"], "train.deepspeed.extra has bf16, which train.precision decides"),
    "stage": (2, ["train.deepspeed.extra.zero_optimization.stage=2"], "train.deepspeed.extra has zero_optimization.stage, which train.deepspeed.zero_stage decides"),
    "no such engine": (2, ["train.engine=megatron", "train.deepspeed.zero_stage=2"], "train.deepspeed is given, but train.engine is megatron: set engine to deepspeed"),
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    """A function that gives the tiny run with other words."""
    file = write_config(tmp_path / "tiny.yaml", tmp_path / "data")

    def config(*words: str) -> Config:
        return load_config(file, ["run.dir=unused", ENGINE, *words], Config)

    return config


@pytest.mark.parametrize("processes, words, says", REFUSED.values(), ids=REFUSED)
def test_refused(config, processes, words, says):
    with pytest.raises(UserError) as caught:
        check_layout(config(*words), processes)
    sentences = [line for line in str(caught.value).splitlines() if "not installed" not in line]
    (sentence,) = sentences
    assert says in sentence


def test_refused_where_it_is_not_installed(config, monkeypatch):
    def find_others(name, *rest):
        return None if name == "deepspeed" else find_spec(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", find_others)
    with pytest.raises(UserError, match="pip install --no-build-isolation deepspeed"):
        check_layout(config(), 2)


@pytest.fixture
def installed(monkeypatch):
    """As if it were, for what needs no more than a config."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name)


def test_large_tables_are_shared_as_all_weights_are(config, installed):
    """With megatron-core these would be split by rows."""
    words = ["model.gengram.kmer_sizes=[12]", "model.gengram.hashing={rows: 200000000, heads: 1}"]
    (large,) = placements(config(*words, "train.engine=megatron"), 2)
    assert large.split == "rows"
    (large,) = placements(config(*words), 2)
    assert (large.split, large.rows_over) == ("columns", None)


def test_features_are_projected(config, installed):
    words = ["model.gengram.kmer_sizes=[1, 2]"]  # so small that tables would be
    megatron = config(*words, "train.engine=megatron")
    assert check_layout(megatron, 2).projection(on_gpu=False).input == "tables"
    deepspeed = config(*words)
    assert check_layout(deepspeed, 2).projection(on_gpu=False) == (
        "features",
        "train.engine is deepspeed",
    )


def test_plan_of_each_stage(config, installed):
    """On two GPUs: from stage to stage less that both hold."""

    def kinds(*words: str) -> dict:
        this = config(*DENSE, "train.precision=bf16", *words)
        planned = plan(this, check_layout(this, 2), Speed(), gigabytes=80)
        weights = planned["parameters_per_rank"]
        found = planned["memory_bytes_per_rank"]
        names = ("weights", "gradients", "optimizer")
        return {name: found[name] / weights for name in names}

    def stage(number: int, *words: str) -> dict:
        return kinds(f"train.deepspeed.zero_stage={number}", *words)

    one = {"weights": 2, "gradients": 4, "optimizer": 6}
    assert kinds("train.engine=megatron") == stage(1) == pytest.approx(one)
    assert stage(2) == pytest.approx({**one, "gradients": 2})
    assert stage(3) == pytest.approx({**one, "gradients": 2, "weights": 1})
    moved = ("train.deepspeed.offload_optimizer=true", "train.deepspeed.offload_parameters=true")
    assert stage(3, *moved) == pytest.approx({"weights": 0, "gradients": 2, "optimizer": 0})


def test_experts_are_shared_by_the_ranks_that_have_them(config, installed):
    """Gradients in ZeRO 2 as Adam's states: on two of four ranks, the rest of the model on all."""
    words = ["parallel.expert=2", "train.precision=bf16", "train.deepspeed.zero_stage=2"]
    this = config(*words)
    planned = plan(this, check_layout(this, 4), Speed(), gigabytes=80)
    found, weights = planned["memory_bytes_per_rank"], planned["parameters_per_rank"]
    assert found["gradients"] / 4 == found["optimizer"] / 12
    model = this.model
    experts = 2 * model.num_layers * 3 * model.hidden_size * model.ffn_hidden_size
    assert found["gradients"] / 4 == pytest.approx(experts / 2 + (weights - experts) / 4)


def test_it_is_imported_only_where_it_runs():
    """Its import takes a second, and changes the environment."""
    program = """
import sys
import gengram_megatron.engine.checkpoint.state, gengram_megatron.engine.training.engines.deepspeed
sys.exit("deepspeed" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], env=environment(), timeout=300)
    assert done.returncode == 0
