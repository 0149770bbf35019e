"""The figures of a plan that are no counts, its warnings, its suggestions, and the command."""

import json
import subprocess
import sys
from itertools import pairwise

import pytest

from gengram_megatron.commands.plan import smallest_world
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.plan import plan
from gengram_megatron.plan.memory import of_stage, peak_rank
from gengram_megatron.plan.stages import ShardedModel
from gengram_megatron.plan.suggest import suggest
from gengram_megatron.plan.time import Speed, stage_flops, step_time
from tests.plan.configs import ROOT, RUNS, load
from tests.test_config_cli import gengram

FORMAL = "pretrain_200b_8k/gengram_window_21"
FORMAL_FILE = RUNS[FORMAL]


def split_of(name: str, processes: int, *words: str) -> ShardedModel:
    config = load(name, *words)
    return ShardedModel(config, check_layout(config, processes))


def planned(processes: int, *words: str, gigabytes: float = 80, **speed) -> dict:
    config = load(FORMAL, *words)
    return plan(config, check_layout(config, processes), Speed(**speed), gigabytes)


def test_time_is_flops_at_the_utilisation():
    found = planned(256, utilisation=0.5, tflops=1000)
    seconds = found["flops_per_step"] / (256 * 0.5 * 1000e12)
    assert found["seconds_per_step"] == pytest.approx(seconds)
    assert found["hours"] == pytest.approx(seconds * found["steps"] / 3600)
    assert found["gpu_hours"] == pytest.approx(256 * found["hours"])
    assert found["flops_per_step"] == found["flops_per_token"] * 1024 * 8192
    # Six FLOPs a token for each active weight, and those of attention's scores.
    assert found["flops_per_token"] == pytest.approx(6 * 3.2e9 + 3 * 12 * 8192 * 2 * 4096, rel=0.02)


@pytest.mark.parametrize("words", [[], ["parallel.virtual_pipeline=3"], ["parallel.pipeline=1"]])
def test_stages_together_do_all_the_work(words):
    split = split_of(FORMAL, 4, *words)
    ranks = 4 // split.layout.pipeline
    work = sum(stage_flops(split, stage) for stage in range(split.layout.pipeline)) * ranks
    assert work == pytest.approx(planned(4, *words)["flops_per_step"])


def test_recomputing_costs_a_forward_pass_and_interleaving_shortens_the_wait():
    times = {
        words: step_time(split_of(FORMAL, 256, *words), Speed())
        for words in ((), ("train.recompute=full",), ("parallel.virtual_pipeline=3",))
    }
    once, full, interleaved = times.values()
    assert full.arithmetic == pytest.approx(4 / 3 * once.arithmetic, rel=0.01)
    assert interleaved.bubble == pytest.approx(once.bubble / 3)
    assert interleaved.communication > once.communication


def test_memory_grows_with_what_is_in_flight_and_shrinks_with_splits():
    published = split_of(FORMAL, 256)
    first, last = of_stage(published, 0), of_stage(published, 1)
    assert first.activations > 1.5 * last.activations  # two microbatches, against one
    full = peak_rank(split_of(FORMAL, 256, "train.recompute=full"))
    experts = peak_rank(split_of(FORMAL, 256, "parallel.expert=8"))
    assert full.activations < first.activations / 5
    assert experts.weights < first.weights / 4
    alone = peak_rank(split_of(FORMAL, 2))
    # Adam's states of half of the model on one rank: 12 bytes a weight.
    assert alone.optimizer == alone.weights // 2 * 12
    assert peak_rank(published).optimizer == pytest.approx(alone.optimizer / 128, rel=0.01)


@pytest.mark.parametrize(
    "processes, words, says",
    [
        (2, [], "more than 80 GB"),
        (16, ["parallel.pipeline=4", "train.global_batch_size=8"], "2 of them are idle"),
        (16, ["parallel.pipeline=4", "train.global_batch_size=32"], "is idle for 27% of a step"),
        (16, ["parallel.first_stage_layers=8"], "stage 1 of 2 has 3"),
        (32, ["model.num_query_groups=16", "parallel.tensor=16"], "parallel.tensor is 16"),
    ],
)
def test_warnings(processes, words, says):
    assert any(says in sentence for sentence in planned(processes, *words)["warnings"])


def test_a_good_layout_has_no_warnings():
    assert planned(256)["warnings"] == []


def test_what_cannot_work_is_an_error():
    done = gengram("plan", FORMAL_FILE, "parallel.expert=3", "--nproc", "12")
    assert done.returncode == 2
    assert "model.num_experts is 8, which is not a multiple of parallel.expert = 3" in done.stderr


@pytest.mark.parametrize(
    "words, least",
    [
        ((), 2),
        (("parallel={pipeline: 3, tensor: 2, expert: 4}",), 24),
        (("parallel={pipeline: 1, tensor: 2, expert: 4, expert_tensor: 1}",), 4),
        (("parallel={context: 2, expert: 4}",), 8),
    ],
)
def test_the_smallest_world_is_the_smallest_that_works(words, least):
    words = (*words, "train.global_batch_size=24")
    config = load(FORMAL, *words)
    assert smallest_world(config) == least
    check_layout(config, least)
    for fewer in range(1, least):
        with pytest.raises(UserError):
            check_layout(config, fewer)


def test_suggestions_fit_and_start_with_the_fastest():
    config, gigabytes = load(FORMAL), 40
    found = suggest(config, 64, gigabytes, Speed())
    assert all(one.memory.total <= gigabytes * 1e9 for one in found)
    fastest = min(one.time.total for one in found)
    assert found[0].time.total < 1.05 * fastest
    assert all(b.time.total > 0.95 * a.time.total for a, b in pairwise(found))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("parallel.first_stage_layers=4", "parallel.last_stage_layers=8"),
        ("parallel.virtual_pipeline=3", "parallel.context=2", "train.recompute=full"),
        ("parallel.tensor=2", "parallel.sequence=false", "parallel.expert_tensor=1"),
    ],
)
def test_the_words_of_a_suggestion_make_its_layout(words):
    found = suggest(load(FORMAL, *words), 16, 80, Speed())
    for one in [*found[:5], *found[5::40]]:
        split = split_of(FORMAL, 16, *words, *one.words.split())
        assert (peak_rank(split), step_time(split, Speed())) == (one.memory, one.time), one.words


def test_a_config_that_is_the_best_has_nothing_to_change():
    config = load(FORMAL)
    best = suggest(config, 8, 80, Speed())[0]
    again = suggest(load(FORMAL, *best.words.split()), 8, 80, Speed())[0]
    assert (again.words, again.memory, again.time) == ("", best.memory, best.time)


def test_suggestions_know_no_more_than_the_gpus_have():
    config = load(FORMAL)
    with pytest.raises(UserError, match="no layout on 8 GPUs fits in 10 GB: the smallest needs"):
        suggest(config, 8, 10, Speed())
    with pytest.raises(UserError, match="not a multiple"):
        suggest(config, 7, 80, Speed())


def test_suggest_as_a_command():
    words = ("plan", FORMAL_FILE, "--suggest", "--gpus", "16", "--memory", "80")
    shown = gengram(*words, COLUMNS="160")
    assert shown.returncode == 0, shown.stderr
    assert "The first: " in shown.stdout
    found = json.loads(gengram(*words, "--json").stdout)
    assert found[0]["seconds_per_step"] == sum(found[0]["time"].values())
    assert found[0]["memory"]["weights"] > 0 and found[1]["settings"]
    refused = gengram("plan", FORMAL_FILE, "--suggest")
    assert refused.returncode == 2 and "--gpus" in refused.stderr


def test_the_command_shows_what_json_has():
    shown = gengram("plan", FORMAL_FILE, "--gpus", "256", COLUMNS="120")
    assert shown.returncode == 0, shown.stderr
    for words in ("25,066,252", "25,065,472", "optimizer", "at 40% of 989 TFLOP/s", "pipeline"):
        assert words in shown.stdout
    small = gengram("plan", FORMAL_FILE, "--memory", "20")
    assert "warning: a rank needs about" in small.stdout


def test_planning_needs_no_torch():
    code = (
        "import sys\n"
        "from gengram_megatron.commands.cli import app\n"
        f"app(['plan', {str(FORMAL_FILE)!r}], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_length_in_steps_is_as_good():
    config = load_config(RUNS["smoke/cpu"], [], Config)
    found = plan(config, check_layout(config, 4), Speed(), 80)
    assert found["samples"] == found["samples_trained"] == 80 * 8


def test_a_config_that_says_how_it_is_launched_is_planned_so():
    file = RUNS["genos/gengram_10b"]
    launch = load_config(file, [], Config).launch
    found = json.loads(gengram("plan", file, "--json").stdout)
    assert found["processes"] == launch.nodes * launch.processes > 2
    assert json.loads(gengram("plan", file, "--json", "--nproc", "64").stdout)["processes"] == 64
