"""The runs under configs/ make their first step and their validation, scaled down. Of a sweep over
one key it is the first and the last run; that all are what they say is in test_configs.py."""

import math

import pytest

from gengram_megatron.commands.plan import smallest_world
from gengram_megatron.config.weights import count_parameters
from tests.plan.configs import RUNS, load
from tests.selection import quick_or_thorough, selected
from tests.training.launch import run_jobs
from tests.training.tiny import entries, write_few

SMALLER = (
    "model.hidden_size=32",
    "model.ffn_hidden_size=32",
    "model.seq_length=64",
    "model.vocab_size=32",
    "model.gengram.dim=8",
    "model.mla={kv_lora_rank: 16, qk_head_dim: 4, qk_pos_emb_head_dim: 4, v_head_dim: 8}",
    "data.workers=0",
    "train.precision=fp32",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "train.validation_samples=2",
    "checkpoint.at_end=false",
    "checkpoint.load=null",  # from a run that is not here
)


def smaller(name: str) -> list[str]:
    """Words that keep what a run is and cut its size: one step, at most two processes."""
    config, words = load(name), [*SMALLER]
    words.append("train.steps=1" if config.train.steps else "train.samples=2")
    if config.model.num_experts:
        words.append("model.num_experts=4")
    if config.parallel.expert > 1:
        words.append("parallel.expert=2")
    if config.parallel.context > 1 and config.parallel.tensor == 1:
        words += ["parallel.context=2", "parallel.pipeline=1"]
    if config.parallel.tensor > 1:
        words += ["parallel.pipeline=1", "parallel.context=1"]
        words += ["parallel.expert_tensor=1"] if config.parallel.expert > 1 else []
    return words


FAMILIES = {name.split("/")[0]: name for name in RUNS}  # of each folder of configs one run
ONE_KEY = ("layer_sweep", "window_sweep")


def started_runs() -> list[str]:
    """Without the runs between the ends of a sweep over one key."""
    names = {name: None for name in RUNS if name.split("/")[-2] not in ONE_KEY}
    for sweep in ONE_KEY:
        first, *_, last = (name for name in RUNS if name.split("/")[-2] == sweep)
        names |= {first: None, last: None}
    return [name for name in RUNS if name in names or name in FAMILIES.values()]


NAMES = quick_or_thorough(started_runs(), FAMILIES.values())


@pytest.fixture(scope="module")
def started(tmp_path_factory, request):
    """The folder of all runs, and what each rank said of each."""
    folder = tmp_path_factory.mktemp("starts")
    write_few(folder / "few")
    jobs = {1: {}, 2: {}}
    for name in selected(request, "name"):
        words, path = smaller(name), RUNS[name]
        place = [f"data.path={folder / 'few'}", f"run.dir={folder / 'runs' / name}"]
        job = name.replace("/", "__")
        jobs[smallest_world(load(name, *words))][job] = ["train", str(path), *words, *place]
    said = {}
    for processes, own in jobs.items():
        said |= run_jobs(processes, own, folder / f"jobs_{processes}")
    return folder, said


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_first_step(name, started):
    folder, said = started
    ranks = said[name.replace("/", "__")]
    assert all(rank.code == 0 for rank in ranks), ranks[0].err
    (step,) = entries(folder / "runs" / name, "train")
    (validation,) = entries(folder / "runs" / name, "validation")
    # Untrained: as good as guessing among all 32 ids. After a step not worse.
    assert step["loss"] == pytest.approx(math.log(32), abs=0.1)
    assert 0 < validation["loss"] < step["loss"] + 0.1
    parameters = count_parameters(load(name, *smaller(name))).total
    assert f"{parameters:,} parameters" in ranks[0].out + ranks[0].err
