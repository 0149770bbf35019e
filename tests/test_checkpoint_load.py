"""checkpoint.load: a new run from the weights of another, longer sequences and all."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.data.run_data import RunData
from gengram_megatron.runs.store import CheckpointStore, read_facts
from tests.training.launch import run_jobs
from tests.training.tiny import build_data, entries, losses, write_config

# All runs are made in the fixture, which counts as part of the first test.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEP = "step_00000003"
LONGER = ["model.seq_length=128", "model.rotary_base=50000", "run.seed=6", "train.steps=4"]
REFUSED = {
    "model.hidden_size": ("64", "32, not 64"),
    "model.gengram.kmer_sizes": ("[1, 6]", "[1, 2, 3, 4, 5, 6], not [1, 6]"),
    "model.gengram.share_reverse_complements": ("true", "false, not true"),
    "model.gengram.enabled": ("false", "true, not false"),
    "model.gengram.window": ("12", "21, not 12"),
}


class Runs:
    """A source of 64 bases on two tensor-parallel ranks, and what goes on from it on one
    process."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.file = folder, write_config(folder / "tiny.yaml", data)
        self.longer = build_data(folder / "dna_128", 128)
        source = ["train", str(self.file), f"run.dir={folder / 'source'}", "train.steps=3"]
        run_jobs(2, {"source": [*source, "parallel.tensor=2"]}, folder / "jobs_2")
        self.checkpoint = folder / "source/checkpoints" / STEP
        strip(self.checkpoint, folder / "stripped/checkpoints")
        ended = run_jobs(1, self._jobs(), folder / "jobs_1")
        self.said = {name: ranks[0] for name, ranks in ended.items()}

    def words(self, name: str, load: Path, *settings: str) -> list[str]:
        of_run = [f"run.dir={self.folder / name}", f"checkpoint.load={load}"]
        return [*of_run, f"data.path={self.longer}", *LONGER, *settings]

    def _jobs(self) -> dict[str, list[str]]:
        source, stripped = self.folder / "source", self.folder / "stripped"
        jobs = {
            "long": self.words("long", source, "train.stop_at=2", "checkpoint.interval=2"),
            "on": self.words("long", source),
            "of_checkpoint": self.words("of_checkpoint", self.checkpoint, "train.stop_at=1"),
            "of_stripped": self.words("of_stripped", stripped, "train.stop_at=1"),
            "nothing": self.words("nothing", self.folder),
            "resumed_stripped": [f"run.dir={stripped}", "train.steps=4"],
            **{
                key: self.words("refused", source, f"{key}={value}")
                for key, (value, _) in REFUSED.items()
            },
        }
        return {name: ["train", str(self.file), *words] for name, words in jobs.items()}


def strip(checkpoint: Path, folder: Path) -> None:
    """The weights of a checkpoint as one without an optimizer."""
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if hasattr(entry, "size") and not name.startswith("optimizer.")
    }
    dcp.load(weights, checkpoint_id=checkpoint, no_dist=True)
    facts, store = read_facts(checkpoint), CheckpointStore(folder)
    partial = store.begin(facts.step)
    dcp.save(weights, checkpoint_id=partial, no_dist=True)
    common = torch.load(checkpoint / "common.pt", weights_only=False)
    torch.save({name: common[name] for name in ("config", "step")}, partial / "common.pt")
    formats = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in formats}
    (partial / "metadata.json").write_text(json.dumps(formats | versions))
    store.finish(partial, facts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    return Runs(tmp_path_factory.mktemp("load"), data)


def loss_of_weights(config: Config, checkpoint: Path) -> float:
    """Of the first batch, with weights that are copied from the checkpoint one by one."""
    from gengram_megatron.engine.processes import end_processes, start_processes

    layout = check_layout(config, 1)
    start_processes(layout, config.run.seed, 0)
    from gengram_megatron.engine.model.build import build_model, wrap_for_data_parallelism
    from gengram_megatron.engine.model.initialize import sharded_parameters
    from gengram_megatron.engine.training.optimizer import build_optimizer
    from gengram_megatron.engine.training.step import forward_backward, reduce_step_status

    chunks = wrap_for_data_parallelism(build_model(config, layout), config, layout)
    build_optimizer(config, chunks)
    described = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    for part, _, _ in sharded_parameters(chunks[0].module):
        whole = {part.key: torch.empty(described[part.key].size)}
        dcp.load(whole, checkpoint_id=checkpoint, no_dist=True)
        place = tuple(
            slice(o, o + n) for o, n in zip(part.global_offset[-part.data.ndim :], part.data.shape)
        )
        first = part.global_offset[: part.prepend_axis_num]
        part.data.data.copy_(whole[part.key][(*first, *place)])
    batches = RunData(config).training(layout, 0, 0)
    report = forward_backward(chunks, next(batches), config, layout, forward_only=True)
    loss = reduce_step_status(report).loss
    end_processes()
    return loss


def test_first_loss_is_that_of_the_weights_at_the_new_length(runs: Runs) -> None:
    words = runs.words("long", runs.folder / "source")
    config = load_config(runs.file, words, Config)
    first = losses(runs.folder / "long")[0]
    assert first == pytest.approx(loss_of_weights(config, runs.checkpoint), rel=1e-6)


def test_all_else_begins_anew(runs: Runs) -> None:
    steps = entries(runs.folder / "long", "train")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert steps[0]["tokens"] == 8 * 128
    said = runs.said["long"].out
    assert f"starting from the weights of {runs.checkpoint}, until step 2 of 4" in said


def test_run_with_checkpoints_of_its_own_goes_on_from_them_and_says_so(runs: Runs) -> None:
    assert runs.said["on"].code == 0, runs.said["on"].err
    expected = f"resuming after step 2, not from checkpoint.load = {runs.folder / 'source'}"
    assert expected in runs.said["on"].out


@pytest.mark.parametrize("name", ["of_checkpoint", "of_stripped"])
def test_one_checkpoint_or_weights_alone_do_as_well(runs: Runs, name: str) -> None:
    assert losses(runs.folder / name)[0] == losses(runs.folder / "long")[0]


@pytest.mark.parametrize("key", REFUSED)
def test_another_model_is_refused(runs: Runs, key: str) -> None:
    said, (_, values) = runs.said[key], REFUSED[key]
    assert said.code == 2
    assert f"{runs.checkpoint} was trained with {key} = {values}: set {key} as it was" in said.err
    assert len(said.err.splitlines()) == 1


def test_folder_without_checkpoints_is_refused(runs: Runs) -> None:
    said = runs.said["nothing"]
    assert said.code == 2 and "neither a checkpoint nor the folder of a run" in said.err
    assert len(said.err.splitlines()) == 1


def test_run_does_not_resume_from_weights_alone(runs: Runs) -> None:
    said = runs.said["resumed_stripped"]
    assert said.code == 2 and "holds weights only, without the optimizer" in said.err
    assert len(said.err.splitlines()) == 1
