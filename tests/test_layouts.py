"""Loss and every gradient, in every layout, are those of one process in float32."""

from pathlib import Path

import pytest
import torch

from tests.layouts.cases import ALONE, CASES
from tests.layouts.launch import launch
from tests.selection import quick_or_thorough, selected

# All cases run in the fixture, which counts as part of the first test.
pytestmark = pytest.mark.timeout(2400)


# Each kind of parallelism once, each way of splitting tables, and recomputation.
QUICK = (
    "tp2_sp", "tp2_dense_full", "pp2", "pp2_vpp3_full", "pp2_uneven_no_memory", "ep2", "dp2", "cp2",
    "cp2_documents", "dp2_rows", "ep2_rows", "tp2_sp_hashed_rows", "tp2_sp_projected", "tp2_sp_bias",
    "tp2_sp_dense_mla", "tp2_sp_ep2_etp1", "tp2_sp_pp2_full", "tp2_sp_cp2_full",
)  # fmt: skip
NAMES = quick_or_thorough(CASES, QUICK)


@pytest.fixture(scope="module")
def results(tmp_path_factory, request) -> Path:
    from tests.layouts.worker import run

    folder = tmp_path_factory.mktemp("layouts")
    names = [name for name in CASES if name in {"pp2", *selected(request, "name")}]
    for name in sorted({ALONE[name] for name in names}):
        launch(1, run, name, "alone", folder)
    for name in names:
        launch(CASES[name][0], run, name, "split", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
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
@pytest.mark.parametrize("name", NAMES)
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
