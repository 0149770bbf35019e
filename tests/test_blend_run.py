"""A run on a blend as a user sees it: resumed in another layout, scored by set, and refused where
its data sets have changed."""

from pathlib import Path

import numpy as np
import pytest

from tests.built_sets import random_fragments, write_set
from tests.training.launch import Ended, run_jobs
from tests.training.tiny import DENSE, RUN, entries, losses, write_config

LENGTH = RUN["model"]["seq_length"]
SETTINGS = [
    *DENSE,
    "model.num_layers=2",
    "model.gengram.layers=[2]",
    "train.steps=6",
    "train.validation_interval=3",
]


class Runs:
    """The folder of all runs, and what each command said."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = write_config(folder / "tiny.yaml", folder / "human")
        self.said: dict[str, Ended] = {}
        for name, (count, seed) in {"human": (12, 1), "apes": (40, 2), "rebuilt": (12, 3)}.items():
            fragments = random_fragments(count + 4, LENGTH, seed)
            # Other probabilities of bases in each set, so that losses tell them apart.
            fragments[fragments == fragments[0, 0]] = fragments[0, seed]
            write_set(folder / name, *np.split(fragments, [count]))

    def launch(self, processes: int, **jobs: list[str]) -> None:
        commands = {name: ["train", str(self.config), *words] for name, words in jobs.items()}
        ended = run_jobs(processes, commands, self.folder / f"jobs_{processes}")
        self.said |= {name: ranks[0] for name, ranks in ended.items()}

    def words(self, run: str, *others: str, first: str = "human", weight: float = 0.6) -> list[str]:
        parts = ((first, weight), ("apes", 0.4))
        blend = [f"{{path: {self.folder / name}, weight: {w}}}" for name, w in parts]
        return [
            f"run.dir={self.folder / run}",
            *SETTINGS,
            "data.path=null",
            f"data.blend=[{', '.join(blend)}]",
            *others,
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """A whole run; one that is cut after step 2, asked to go on with other data, and then goes on
    on two processes."""
    this = Runs(tmp_path_factory.mktemp("blend"))
    this.launch(
        1,
        whole=this.words("whole"),
        cut=this.words("cut", "train.stop_at=2"),
        rebuilt=this.words("cut", first="rebuilt"),
        share=this.words("cut", weight=0.4),
        alone=[f"run.dir={this.folder / 'cut'}", *SETTINGS],
    )
    this.launch(2, on_two=this.words("cut"))
    return this


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_on_two_processes_goes_on_with_the_same_samples(runs: Runs) -> None:
    assert "resuming after step 2" in runs.said["on_two"].out
    cut, whole = runs.folder / "cut", runs.folder / "whole"
    assert len(losses(whole)) == 6
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-5)
    for kind in ("loss", "loss/human", "loss/apes"):
        scores = [{e["step"]: e[kind] for e in entries(run, "validation")} for run in (cut, whole)]
        del scores[0][2]  # the end of the job that was cut
        assert scores[1].keys() == {3, 6} and scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_the_loss_in_all_is_that_of_the_sets_in_their_shares(runs: Runs) -> None:
    for entry in entries(runs.folder / "whole", "validation"):
        human, apes = entry["loss/human"], entry["loss/apes"]
        assert human != pytest.approx(apes, rel=1e-3)
        assert entry["loss"] == pytest.approx(0.6 * human + 0.4 * apes, rel=1e-12)


def test_the_run_says_what_it_reads_and_how_it_waited(runs: Runs) -> None:
    out = runs.said["whole"].out
    assert "data human: 60.00% of the samples, " in out
    assert "warning: data human is read " in out and "warning: data apes" not in out
    assert "  human 1." in out or "  human 2." in out
    assert out.splitlines()[-1].startswith("6 steps in ")
    assert all(0 < e["data_wait"] < 1 for e in entries(runs.folder / "whole", "train"))


@pytest.mark.parametrize(
    "job, difference",
    {
        "rebuilt": "data set 1 was built again or is a different one",
        "share": "the share of data set 1 was 3/5 of the samples, not 1/2",
        "alone": "it had 2 data sets, not 1",
    }.items(),
)
def test_data_that_changed_since_the_checkpoint_is_refused(runs: Runs, job, difference) -> None:
    said = runs.said[job]
    assert said.code == 2 and len(said.err.splitlines()) == 1
    assert (
        f"step_00000002 was trained on different data: {difference}; give the data sets as they were, "
        "or start in another run.dir"
    ) in said.err
