"""Loss and every gradient, in every layout, are those of one process in float32."""

from pathlib import Path

import pytest
import torch

from tests.layouts.cases import ALONE, CASES
from tests.layouts.launch import launch

# All cases run in the fixture, which counts as part of the first test.
pytestmark = pytest.mark.timeout(2400)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    from tests.layouts.worker import run

    folder = tmp_path_factory.mktemp("layouts")
    for name in sorted(set(ALONE.values())):
        launch(1, run, name, "alone", folder)
    for name, (processes, *_) in CASES.items():
        launch(processes, run, name, "split", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_layout_gives_the_answer_of_one_process(results: Path, name: str) -> None:
    alone = torch.load(results / f"alone_{ALONE[name]}.pt")
    split = torch.load(results / f"split_{name}.pt")
    assert split["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert split["gradients"].keys() == alone["gradients"].keys()
    for key, expected in alone["gradients"].items():
        error = (split["gradients"][key] - expected).norm() / expected.norm()
        assert expected.norm() > 0, key
        assert error < 1e-4, f"{key}: {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parameters_added_up_over_the_ranks_are_there_exactly_once(results, name: str) -> None:
    split = torch.load(results / f"split_{name}.pt")
    sizes = {key: grad.numel() for key, grad in split["gradients"].items()}
    assert split["held_once"] == sizes


@pytest.mark.slow
def test_tables_of_the_reference_get_gradients_only_where_tokens_touch_them(results: Path) -> None:
    gradients = torch.load(results / f"alone_{ALONE['pp2']}.pt")["gradients"]
    table = gradients["decoder.layers.1.memory.tables.weights.k6"]
    touched = table.abs().sum(1) > 0
    assert 0 < touched.sum() < len(table)  # 4 x 64 positions against 15,625 rows
