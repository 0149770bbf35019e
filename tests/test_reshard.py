"""A checkpoint of any layout goes on in any other, as if nothing had been."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.layouts.launch import launch
from tests.resharding.cases import BEFORE, BF16, PAIRS
from tests.selection import quick_or_thorough, selected
from tests.training.tiny import build_data, write_config

# All pairs run in the fixture, which counts as part of the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@dataclass(frozen=True)
class Results:
    folder: Path

    def source(self, name: str) -> dict:
        """What the run had that wrote the checkpoint, and did without a break."""
        return torch.load(self.folder / f"{PAIRS[name].source_name}.pt")

    def target(self, name: str) -> dict:
        """What the run had that loaded it, and did."""
        return torch.load(self.folder / f"{name}.pt")


# The random states of these are compared, too.
ALWAYS = ("ep2_to_itself", "pp4_to_pp2", "rows_to_columns")
QUICK = (*ALWAYS, "tp2_pp2_to_one", "one_to_vpp", "cp2_to_tp2", "bf16_distributed_to_plain")
NAMES = quick_or_thorough(PAIRS, QUICK)


@pytest.fixture(scope="module")
def results(tmp_path_factory, request) -> Results:
    from tests.resharding.worker import run

    folder = tmp_path_factory.mktemp("reshard")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    config = write_config(folder / "tiny.yaml", data)
    for name in {*ALWAYS, *selected(request, "name")}:
        pair = PAIRS[name]
        if not (folder / f"{pair.source_name}.pt").exists():
            launch(pair.source.processes, run, name, True, config, folder)
        launch(pair.target.processes, run, name, False, config, folder)
    return Results(folder)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_there_bit_for_bit(results: Results, name: str) -> None:
    written, loaded = results.source(name)["tensors"], results.target(name)["tensors"]
    assert {kind for kind, _ in loaded} == {"weight", "main", "exp_avg", "exp_avg_sq"}
    assert loaded.keys() == written.keys()
    for key, expected in written.items():
        assert torch.equal(loaded[key], expected), key


@pytest.mark.parametrize("name", NAMES)
def test_next_steps_are_those_of_the_unbroken_run(results: Results, name: str) -> None:
    target = results.target(name)
    assert target["start"] == BEFORE
    expected, rates = zip(*results.source(name)["steps"])
    found, own_rates = zip(*target["steps"])
    assert own_rates == rates
    assert found == pytest.approx(expected, rel=1e-3 if BF16 in PAIRS[name].shared else 1e-5)


def test_random_states_are_each_ranks_own_on_the_same_layout(results: Results) -> None:
    draws = results.source("ep2_to_itself")["draws"]
    assert results.target("ep2_to_itself")["draws"] == draws
    assert draws[0] != draws[1]


def test_random_states_of_another_layout_are_decided_by_seed_and_step(results: Results) -> None:
    one, other = results.target("pp4_to_pp2"), results.target("rows_to_columns")
    assert one["draws"] == other["draws"]
    assert one["draws"] != results.source("pp4_to_pp2")["draws"][:2]
