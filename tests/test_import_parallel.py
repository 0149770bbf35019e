"""Published models that several ranks saved together, in every layout, become ours to the bit."""

import shutil

import pytest
import torch

from gengram_megatron.checkpoint.exchange.importing import import_model
from gengram_megatron.checkpoint.exchange.megatron import open_megatron
from tests.exchange_models import load
from tests.layouts.launch import launch
from tests.published_model import check_weights, published_model, save_ranks
from tests.published_worker import save

SEPARATE_LAYERS = {"non_homogeneous_layers": True}
SEPARATE_PARTS = {"singleton_local_shards": True}
# Processes; tensor-, pipeline- and expert-parallel ranks; how megatron-core writes; experts.
DISTRIBUTED = {
    "one": (1, (1, 1, 1), {}, "sequential"),
    "tp2": (2, (2, 1, 1), {}, "sequential"),
    "pp2": (2, (1, 2, 1), {}, "sequential"),
    "tp2_pp2": (4, (2, 2, 1), {}, "sequential"),
    "ep2": (2, (1, 1, 2), {}, "sequential"),
    "pp2_ep2": (4, (1, 2, 2), {}, "sequential"),
    "tp2_ep2_grouped": (4, (2, 1, 2), {}, "grouped"),
    "ep2_layers": (2, (1, 1, 2), SEPARATE_LAYERS, "sequential"),
    "tp2_parts": (2, (2, 1, 1), SEPARATE_PARTS, "sequential"),
    "ep2_parts_grouped": (2, (1, 1, 2), SEPARATE_PARTS, "grouped"),
}
RANKS = {
    "ep2": (1, 1, 2),
    "ep4": (1, 1, 4),
    "pp2_ep2": (1, 2, 2),
    "tp2_ep2": (2, 1, 2),
    "tp2_pp2_ep2": (2, 2, 2),
}


@pytest.fixture(scope="module")
def published(one_process, tmp_path_factory):
    """The model, and a folder with its weights."""
    folder = tmp_path_factory.mktemp("published")
    gpt = published_model(load(folder, "unused"), one_process)
    weights = {name: weight for name, weight in gpt.state_dict().items() if weight is not None}
    torch.save(weights, folder / "whole.pt")
    return gpt, folder


@pytest.mark.slow
@pytest.mark.parametrize("case", DISTRIBUTED)
def test_distributed_checkpoint_of_every_layout(published, tmp_path, case) -> None:
    gpt, folder = published
    processes, sizes, metadata, experts = DISTRIBUTED[case]
    shutil.copy(folder / "whole.pt", tmp_path)
    launch(processes, save, tmp_path, (), sizes, metadata, experts == "grouped")
    config = load(tmp_path, "run")
    check_weights(import_model(tmp_path, config), config, gpt)
    assert open_megatron(tmp_path / "iter_0000100").skipped == ["mtp.layers.0.enorm.weight"]


@pytest.mark.parametrize("experts", ["transformer_engine", "sequential", "grouped"])
@pytest.mark.parametrize("case", RANKS)
def test_rank_files_of_every_layout(published, tmp_path, case, experts) -> None:
    gpt, config = published[0], load(tmp_path, "run")
    save_ranks(gpt, config, tmp_path / "there", *RANKS[case], experts)
    check_weights(import_model(tmp_path / "there", config), config, gpt)


@pytest.mark.parametrize("experts", ["transformer_engine", "grouped"])
def test_rank_files_of_experts_that_ranks_do_not_share(published, tmp_path, experts) -> None:
    """Two tensor-parallel ranks, each with half of the experts as a whole."""
    gpt, config = published[0], load(tmp_path, "run")
    save_ranks(gpt, config, tmp_path / "there", 2, 2, 2, experts, expert_tensor=1)
    assert len(list((tmp_path / "there" / "iter_0000100").iterdir())) == 4
    check_weights(import_model(tmp_path / "there", config), config, gpt)
