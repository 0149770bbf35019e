"""What a run reads: one data set or a blend, in every layout, and what is said of it."""

import json
from fractions import Fraction
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.data.run_data import RunData
from gengram_megatron.engine.data.samples import SampleOrder
from gengram_megatron.errors import UserError
from gengram_megatron.tokenizer import EOD
from tests.built_sets import random_fragments, write_set

LENGTH, BATCH = 16, 8
TRAIN = {"human": 30, "apes": 12, "mouse": 50}
VALIDATION = {"human": 10, "apes": 9, "mouse": 3}
WEIGHTS = {"human": 0.5, "apes": 0.3, "mouse": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the three data sets."""
    folder = tmp_path_factory.mktemp("sets")
    for seed, name in enumerate(TRAIN):
        fragments = random_fragments(TRAIN[name] + VALIDATION[name], LENGTH, seed)
        write_set(folder / name, fragments[: TRAIN[name]], fragments[TRAIN[name] :])
    return folder


def blend(folder: Path, weights: dict[str, float] = WEIGHTS) -> dict:
    """The section `data` of a config."""
    parts = [{"path": str(folder / name), "weight": w} for name, w in weights.items()]
    return {"blend": parts, "workers": 0}


def config(data: dict, **train) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": "run", "seed": 7},
            "model": {
                "hidden_size": 8,
                "num_layers": 1,
                "attention": "mha",
                "num_attention_heads": 1,
                "ffn_hidden_size": 8,
                "seq_length": LENGTH,
            },
            "data": data,
            "train": {"global_batch_size": BATCH, "steps": 25, **train},
        }
    )


def layout(config: Config, ranks: int) -> Layout:
    return check_layout(config, ranks)


def steps(data: RunData, ranks: int, consumed: int, count: int) -> list[list[bytes]]:
    """The fragments of each step in the order of their positions, put together from all ranks."""
    config = data.config
    streams = [data.training(layout(config, ranks), rank, consumed) for rank in range(ranks)]
    read = []
    for _ in range(count):
        dealt = zip(*map(next, streams), strict=True)
        rows = [row for together in dealt for microbatch in together for row in microbatch]
        read.append([bytes(row.numpy()) for row in rows])
    for stream in streams:
        stream.close()
    return read


@pytest.mark.parametrize("ranks, micro", [(2, 1), (2, 4), (4, 2), (8, 1)])
def test_a_blend_resumes_at_its_place_in_another_layout(folder, ranks, micro):
    data = blend(folder)
    whole = steps(RunData(config(data)), 1, consumed=0, count=25)
    other = RunData(config(data, micro_batch_size=micro))
    for cut in (0, 1, 13):
        assert steps(other, ranks, cut * BATCH, 25 - cut) == whole[cut:]


def test_processes_that_read_ahead_read_the_same(folder):
    data = blend(folder)
    ahead = RunData(config({**data, "workers": 2}))
    assert steps(ahead, 2, 16, 6) == steps(RunData(config(data)), 2, 16, 6)


def test_no_sample_comes_again_before_all_of_its_set_have_come(folder):
    data = RunData(config(blend(folder)))
    fragments = {name: list(map(bytes, one.train)) for name, one in named(data).items()}
    read = [*chain(*steps(data, 1, consumed=0, count=25))]
    assert len(read) == 200
    for name, share in WEIGHTS.items():
        own = [row for row in read if row in fragments[name]]
        assert abs(len(own) - 200 * share) <= 10
        for start in range(0, len(own), TRAIN[name]):
            epoch = own[start : start + TRAIN[name]]
            assert len(set(epoch)) == len(epoch)


def named(data: RunData) -> dict:
    return {one.name: one for one in data.sets}


def test_one_path_and_a_blend_of_one_are_the_same_run(folder):
    path = RunData(config({"path": str(folder / "human"), "workers": 0}))
    alone = RunData(config(blend(folder, {"human": 3})))
    read = steps(path, 1, consumed=0, count=8)
    assert read == steps(alone, 1, consumed=0, count=8) and path.facts == alone.facts
    order = SampleOrder(TRAIN["human"], 7).samples_at(np.arange(64))
    assert [*chain(*read)] == [bytes(path.sets[0].train[sample]) for sample in order]


def test_weights_are_meant_as_they_are_written(folder):
    shares = [one.share for one in RunData(config(blend(folder))).sets]
    assert shares == [Fraction(1, 2), Fraction(3, 10), Fraction(1, 5)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("limit", [None, 10])
def test_each_validation_scores_the_samples_of_each_set_once(folder, ranks, limit):
    """10 samples in shares of 1/2, 3/10, 1/5, of which the last set has no more than it has."""
    expected = VALIDATION if limit is None else {"human": 5, "apes": 3, "mouse": 2}
    data = RunData(config(blend(folder), validation_samples=limit))
    rows = {name: [] for name in expected}
    for rank in range(ranks):
        for part in data.validations(layout(data.config, ranks), rank):
            steps = list(part.batches)
            assert len(steps) == part.steps
            microbatches = [microbatch for step in steps for microbatch in step]
            assert len(microbatches) == part.steps * BATCH // ranks
            rows[part.name] += [bytes(row.numpy()) for batch in microbatches for row in batch]
    for name, count in expected.items():
        scored = [row for row in rows[name] if set(row) != {EOD}]
        assert len(scored) == len(set(scored)) == count
        assert set(scored) <= set(map(bytes, named(data)[name].validation))


def test_the_loss_in_all_is_that_of_the_mixture(folder):
    data = RunData(config(blend(folder)))
    assert data.in_all({"human": 1.0, "apes": 2.0, "mouse": 4.0}) == pytest.approx(1.9)


def test_a_run_says_how_often_it_goes_through_each_set(folder):
    assert RunData(config(blend(folder))).statement(160) == [
        "data human: 50.00% of the samples, 80 of 30, 2.67 epochs",
        "warning: data human is read 2.67 times in this run; a larger data set, a shorter run or "
        "a smaller weight repeats less",
        "data apes: 30.00% of the samples, 48 of 12, 4 epochs",
        "warning: data apes is read 4 times in this run; a larger data set, a shorter run or a "
        "smaller weight repeats less",
        "data mouse: 20.00% of the samples, 32 of 50, 0.64 epochs",
    ]
    alone = RunData(config({"path": str(folder / "human")}))
    assert alone.statement(60) == ["data human: 60 of 30, 2 epochs"]


def refused(data: dict) -> str:
    with pytest.raises(UserError) as error:
        RunData(config(data))
    return str(error.value)


def test_a_missing_set_is_named_by_its_place_in_the_blend(folder):
    weights = {"human": 1, "nowhere": 2}
    expected = f"data.blend entry 2.path: there is no folder {folder / 'nowhere'}"
    assert refused(blend(folder, weights)).startswith(expected)


def test_sets_of_other_lengths_are_refused(folder, tmp_path):
    short = write_set(tmp_path / "short", *np.split(random_fragments(9, 8, seed=1), [6]))
    data = blend(folder, {"human": 1, str(short): 1})
    assert refused(data).startswith(f"data.blend entry 2.path: the fragments in {short} have 8 ")


@pytest.mark.parametrize(
    "change, expected", [({"format": 1}, "has format 1"), ({"tokens": {"A": 0}}, "{'A': 0}")]
)
def test_sets_of_another_version_are_refused(folder, tmp_path, change, expected):
    old = write_set(tmp_path / "old", *np.split(random_fragments(9, LENGTH, seed=1), [6]))
    manifest = old / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    message = refused(blend(folder, {"human": 1, str(old): 1}))
    assert expected in message and str(manifest) in message


def test_the_same_samples_twice_are_refused(folder, tmp_path):
    (tmp_path / "copy").symlink_to(folder / "human")
    data = blend(folder, {"human": 1, "apes": 1, str(tmp_path / "copy"): 2})
    assert refused(data) == (
        "data.blend entry 1.path and data.blend entry 3.path hold the same samples; give them "
        "once, with the sum of the weights"
    )


def test_facts_tell_sets_shares_and_their_order_apart(folder):
    facts = [
        RunData(config(blend(folder, weights))).facts
        for weights in (
            {"human": 7, "apes": 3},
            {"apes": 3, "human": 7},
            {"human": 0.7, "apes": 0.31},
            {"human": 7, "mouse": 3},
        )
    ]
    assert all(one not in facts[:i] for i, one in enumerate(facts))
    assert json.loads(json.dumps(facts)) == facts
    assert facts[0] == RunData(config(blend(folder, {"human": 0.7, "apes": 0.3}))).facts
