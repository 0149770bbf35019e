"""Published models that several ranks saved together, in every layout, become ours to the bit."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from gengram_megatron.config.schema import Config
from gengram_megatron.engine.exchange.importing import import_model
from gengram_megatron.engine.exchange.megatron import open_megatron
from gengram_megatron.engine.exchange.megatron_ranks import RANK_FILE
from gengram_megatron.errors import UserError
from gengram_megatron.runs.store import CheckpointStore
from tests.exchange_models import load
from tests.imported_weights import check_weights
from tests.layouts.launch import launch
from tests.published_model import published_model, save_distributed, save_ranks
from tests.published_worker import save
from tests.selection import quick_or_thorough
from tests.untrusted import Evil

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
@pytest.mark.parametrize("case", quick_or_thorough(DISTRIBUTED, ("tp2_pp2", "pp2_ep2")))
def test_distributed_checkpoint_of_every_layout(published, tmp_path, case) -> None:
    gpt, folder = published
    processes, sizes, metadata, experts = DISTRIBUTED[case]
    shutil.copy(folder / "whole.pt", tmp_path)
    launch(processes, save, tmp_path, (), sizes, metadata, experts == "grouped")
    config = load(tmp_path, "run")
    check_weights(import_model(tmp_path, config), config, gpt)
    assert open_megatron(tmp_path / "iter_0000100").skipped == ["mtp.layers.0.enorm.weight"]


@pytest.mark.parametrize("experts", ["transformer_engine", "sequential", "grouped"])
@pytest.mark.parametrize("case", quick_or_thorough(RANKS, ("tp2_pp2_ep2",)))
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


def test_rank_files_without_arguments_are_read_by_their_numbers(published, tmp_path) -> None:
    gpt, config = published[0], load(tmp_path, "run")
    save_ranks(gpt, config, tmp_path / "there", 2, 2, 2)
    for file in (tmp_path / "there").glob(f"*/*/{RANK_FILE}"):
        _change(file, lambda content: content.pop("args"))
    assert open_megatron(tmp_path / "there" / "iter_0000100").arguments == {}
    check_weights(import_model(tmp_path / "there", config), config, gpt)


@pytest.mark.parametrize("prefix", ["model.", "module.", "model.module."])
def test_names_below_those_of_wrappers_are_read(published, tmp_path, prefix) -> None:
    from megatron.core import dist_checkpointing

    gpt, config = published[0], load(tmp_path, "run")
    (tmp_path / "iter_0000100").mkdir()
    state = gpt.sharded_state_dict(prefix=prefix)
    dist_checkpointing.save({"model": state}, str(tmp_path / "iter_0000100"))
    check_weights(import_model(tmp_path / "iter_0000100", config), config, gpt)


def test_distributed_checkpoint_that_lacks_a_file_of_tensors_is_refused(
    published, tmp_path
) -> None:
    config = load(tmp_path, "run")
    save_distributed(published[0], config, tmp_path / "there")
    iteration = tmp_path / "there" / "iter_0000100"
    sorted(iteration.glob("__*.distcp"))[-1].unlink()
    _refused(iteration, config, "cannot be read: No such file")


def _change(file: Path, change) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def _expert_ranks(published, tmp_path: Path) -> tuple[Path, Config]:
    config = load(tmp_path, "run")
    save_ranks(published[0], config, tmp_path / "there", 1, 2, 2)
    return tmp_path / "there" / "iter_0000100", config


def _refused(iteration: Path, config: Config, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)) as error:
        import_model(iteration, config)
    assert len(str(error.value).splitlines()) == 1
    assert not CheckpointStore(Path(config.run.dir) / "checkpoints").newest()


def test_copies_that_differ_between_expert_ranks_are_refused(published, tmp_path) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    name = "decoder.layers.1.mlp.router.weight"  # the second layer of the second stage
    _change(iteration / "mp_rank_00_001_001" / RANK_FILE, lambda c: c["model"][name].add_(1))
    name = "decoder.layers.3.mlp.router.weight differs between mp_rank_00_001_000 and mp_rank_00_"
    _refused(iteration, config, name)


def test_copies_that_differ_between_stages_are_refused(published, tmp_path) -> None:
    """The first and last stage both have the word embeddings where several tokens are predicted."""
    iteration, config = _expert_ranks(published, tmp_path)
    name = "embedding.word_embeddings.weight"
    for expert in (0, 1):
        file = iteration / f"mp_rank_00_001_00{expert}" / RANK_FILE
        _change(file, lambda content: content["model"][name].add_(1))
    _refused(iteration, config, f"{name} differs between mp_rank_00_000_000 and mp_rank_00_001_000")


def test_folder_that_lacks_a_rank_of_the_run_is_refused(published, tmp_path) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    # The ranks that are left would be a whole run of one stage, or of one expert rank.
    shutil.rmtree(iteration / "mp_rank_00_001_001")
    shutil.rmtree(iteration / "mp_rank_00_000_001")
    _refused(iteration, config, "lacks the file of tensor rank 0, pipeline rank 0, expert rank 1")


def test_file_that_another_run_left_is_refused(published, tmp_path) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    shutil.copytree(iteration / "mp_rank_00_001_001", iteration / "mp_rank_01_001_001")
    _refused(iteration, config, "mp_rank_01_001_001 belongs to no rank of the run")
    shutil.move(iteration / "mp_rank_01_001_001", iteration / "mp_rank_of_one")
    _refused(iteration, config, "mp_rank_of_one is not named like the folder of a rank")


def test_two_folders_for_one_rank_are_refused(published, tmp_path) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    shutil.copytree(iteration / "mp_rank_00_001_000", iteration / "mp_rank_00_001")
    _refused(iteration, config, "mp_rank_00_001 and mp_rank_00_001_000 for the same rank")


def test_files_of_two_iterations_are_refused(published, tmp_path) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    later = iteration / "mp_rank_00_001_001" / RANK_FILE
    _change(later, lambda content: content.update(iteration=200))
    expected = "iteration 100 in mp_rank_00_000_000 and 200 in mp_rank_00_001_001"
    _refused(iteration, config, expected)


@pytest.mark.parametrize("size", ["2", 0, -1, None, [2]])
def test_sizes_that_are_no_numbers_say_nothing(published, tmp_path, size) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    for file in iteration.glob(f"*/{RANK_FILE}"):
        _change(file, lambda content: setattr(content["args"], "expert_model_parallel_size", size))
    check_weights(import_model(iteration, config), config, published[0])


def test_shares_that_do_not_fit_together_are_refused(published, tmp_path) -> None:
    config = load(tmp_path, "run")
    save_ranks(published[0], config, tmp_path / "there", 2, 1)
    iteration = tmp_path / "there" / "iter_0000100"
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    _change(
        iteration / "mp_rank_01" / RANK_FILE,
        lambda content: content["model"].update({name: torch.ones(3, 2)}),
    )
    _refused(
        iteration, config, f"shards of {name} do not fit together: their shapes are (32, 16), (3,"
    )


def test_experts_shared_by_more_ranks_than_the_rest_are_refused(published, tmp_path) -> None:
    iteration, config = _expert_ranks(published, tmp_path)
    for file in iteration.glob(f"*/{RANK_FILE}"):
        _change(file, lambda content: setattr(content["args"], "expert_tensor_parallel_size", 2))
    _refused(iteration, config, "expert_tensor_parallel_size 2 of the run does not divide")


def test_weight_that_one_rank_lacks_is_refused(published, tmp_path) -> None:
    config = load(tmp_path, "run")
    save_ranks(published[0], config, tmp_path / "there", 2, 1)
    iteration = tmp_path / "there" / "iter_0000100"
    name = "decoder.layers.0.self_attention.linear_proj.weight"
    _change(iteration / "mp_rank_01" / RANK_FILE, lambda content: content["model"].pop(name))
    _refused(iteration, config, f"lacks {name} of tensor rank 1")


def test_file_without_a_model_is_refused(tmp_path) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    for content in ([1], {"args": None}, {"model": torch.ones(2)}):
        torch.save(content, tmp_path / "mp_rank_00" / RANK_FILE)
        with pytest.raises(UserError, match="holds no model"):
            open_megatron(tmp_path)


def test_grouped_experts_of_another_shape_are_refused(tmp_path) -> None:
    layer = "decoder.layers.0.mlp."
    model = {f"{layer}router.weight": torch.ones(4, 8)}
    (tmp_path / "mp_rank_00").mkdir()
    for name, shape in (("weight1", (8, 30)), ("weight2", (30, 8)), ("weight1", (8,))):
        content = {"model": {**model, f"{layer}experts.{name}": torch.ones(shape)}}
        torch.save(content, tmp_path / "mp_rank_00" / RANK_FILE)
        with pytest.raises(UserError, match=rf"{layer}experts.{name} is .* among 4 experts"):
            open_megatron(tmp_path)
    torch.save(
        {"model": {f"{layer}experts.weight1": torch.ones(8, 8)}},
        tmp_path / "mp_rank_00" / RANK_FILE,
    )
    with pytest.raises(UserError, match=rf"lacks {layer}router.weight"):
        open_megatron(tmp_path)


@pytest.mark.parametrize("number", ["_001", "_000_001"])
def test_file_of_any_rank_that_would_run_code_is_refused(published, tmp_path, number) -> None:
    config = load(tmp_path, "run")
    sizes = {"_001": (1, 1, 2), "_000_001": (1, 2, 2)}[number]
    save_ranks(published[0], config, tmp_path / "there", *sizes, "grouped")
    iteration = tmp_path / "there" / "iter_0000100"
    file = iteration / f"mp_rank_00{number}" / RANK_FILE
    content = torch.load(file, weights_only=False)
    for place in ("args", "model", "mtp"):
        torch.save({**content, place: Evil(tmp_path / "ran")}, file)
        _refused(iteration, config, "is refused, as it would run posix.mkdir")
        assert not (tmp_path / "ran").exists()
