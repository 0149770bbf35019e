"""A run that was killed and started again gives bit for bit the numbers of one that was not."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.runs.store import FORMAT, CheckpointStore, Facts
from tests.selection import quick_or_thorough, selected
from tests.training.launch import Ended, kill, run_jobs, start, wait_for
from tests.training.tiny import build_data, entries, numbers, write_config

# All runs are made in the fixture, which counts as part of the first test.
pytestmark = pytest.mark.timeout(2400)

STEPS, INTERVAL = 16, 4
KILL_AFTER = 6  # steps; later than the first checkpoint

COMMON = [
    f"train.steps={STEPS}",
    "train.validation_interval=3",
    f"checkpoint.interval={INTERVAL}",
    # Settings of the tables that a resumed run must not mix up with those of the rest.
    "optimizer.tables={lr_multiplier: 3, weight_decay: 0}",
    "optimizer.warmup_fraction=0.2",
]
BF16, FP32 = "train.precision=bf16", "train.precision=fp32"
HASHED = [
    "model.gengram.kmer_sizes=[1, 6, 11]",
    "model.gengram.hashing={rows: 5000, heads: 2}",
    "model.gengram.share_reverse_complements=true",
]
AT_ONCE, LATER = "checkpoint.asynchronous=false", "checkpoint.asynchronous=true"


def rows_over(group: str) -> list[str]:
    """Settings of tables that are split by rows."""
    return ["model.gengram.split=rows", f"model.gengram.rows_over={group}"]


#   name: (processes, settings)
CASES = {
    "fp32": (1, [FP32, AT_ONCE, "data.workers=1"]),
    "bf16": (1, [BF16, LATER, "checkpoint.keep=2", "model.gengram.project=tables"]),
    "dp2": (2, [BF16, LATER, "optimizer.overlap_grad_reduce=true",
                "optimizer.overlap_param_gather=true"]),
    # Tables that the ranks share by rows, hashed and direct.
    "dp2_rows": (2, [BF16, LATER, "optimizer.overlap_grad_reduce=true",
                     "optimizer.overlap_param_gather=true", *HASHED, *rows_over("data")]),
    "ep2_rows": (2, [FP32, LATER, "parallel.expert=2", *rows_over("expert")]),
    "tp2_rows": (2, [FP32, AT_ONCE, "parallel.tensor=2", *HASHED, *rows_over("tensor")]),
    # The first stage has no memory, so no tables for the optimizer.
    "pp2_uneven": (2, [FP32, LATER, "parallel.pipeline=2", "parallel.first_stage_layers=1"]),
    "tp2_pp2": (4, [FP32, LATER, "parallel.tensor=2", "parallel.pipeline=2"]),
}  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """Folders of the runs, and what the commands said."""

    folder: Path
    config: Path
    said: dict[str, Ended]
    saved: dict[str, int]  # step of the newest checkpoint when a run was killed

    def whole(self, name: str) -> Path:
        return self.folder / f"{name}_whole"

    def cut(self, name: str) -> Path:
        return self.folder / f"{name}_cut"


# The first three are also compared with each other.
ALWAYS = ("fp32", "ep2_rows", "tp2_pp2")
NAMES = quick_or_thorough(CASES, (*ALWAYS, "bf16"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request) -> Runs:
    """Every case unbroken, and killed and resumed; then what is done to runs that have ended."""
    folder = tmp_path_factory.mktemp("resume")
    config = write_config(
        folder / "tiny.yaml", build_data(tmp_path_factory.getbasetemp() / "dna_64")
    )
    this = Runs(folder, config, {}, {})
    names = [name for name in CASES if name in {*ALWAYS, *selected(request, "name")}]
    for name in names:
        _start_and_kill(this, name)
    for processes in (1, 2, 4):
        jobs = {}
        for name in names:
            wanted, settings = CASES[name]
            if wanted == processes:
                jobs[f"{name}_whole"] = _words(this, this.whole(name), settings)
                jobs[f"{name}_cut"] = _words(this, this.cut(name), settings)
        if processes == 1:
            jobs |= _after_the_end(this)
        for name, ended in run_jobs(processes, jobs, folder / f"jobs_{processes}").items():
            this.said[name] = ended[0]
    return this


def _words(runs: Runs, run: Path, settings: list[str]) -> list[str]:
    return ["train", str(runs.config), f"run.dir={run}", *COMMON, *settings]


def _start_and_kill(runs: Runs, name: str) -> None:
    """A run in processes of its own, killed some steps after its first checkpoint. Then a folder
    such as a kill in the middle of a checkpoint would leave."""
    processes, settings = CASES[name]
    run, output = runs.cut(name), runs.folder / f"{name}.log"
    process = start(processes, _words(runs, run, settings), output)
    try:
        wait_for(lambda: _checkpoints(run) and _steps(run) >= KILL_AFTER, process, output)
    finally:
        kill(process)
    assert not (run / "loss.png").exists(), "the run was over before it was killed"
    runs.saved[name] = int(_checkpoints(run)[-1].removeprefix("step_"))
    partial = run / "checkpoints" / f"step_{runs.saved[name] + INTERVAL:08d}.partial"
    partial.mkdir(exist_ok=True)
    (partial / "metadata.json").write_text("half of it")
    (run / "checkpoints" / "step_00000099.partial").mkdir()


def _after_the_end(runs: Runs) -> dict[str, list[str]]:
    done, settings = runs.cut("fp32"), CASES["fp32"][1]
    return {
        "again": _words(runs, done, settings),
        "other_seed": [*_words(runs, done, settings), "run.seed=6"],
        "other_batch": [*_words(runs, done, settings), "train.global_batch_size=4"],
        "other_window": [*_words(runs, done, settings), "model.gengram.window=null"],
        "other_rope": [*_words(runs, done, settings), "model.rotary_base=500"],
        "other_layers": [*_words(runs, done, settings), "model.num_layers=5"],
    }


def _checkpoints(run: Path) -> list[str]:
    folder = run / "checkpoints"
    return sorted(p.name for p in folder.iterdir() if p.suffix == "") if folder.exists() else []


def _steps(run: Path) -> int:
    return (run / "metrics.jsonl").read_text().count('"train"')


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ep2_rows", "tp2_pp2"])
def test_numbers_of_a_step_are_those_of_all_ranks(runs: Runs, name: str) -> None:
    found, expected = (entries(runs.whole(case), "train")[0] for case in (name, "fp32"))
    for key in ("loss", "grad_norm", "router_z_loss", "rows_touched"):
        assert found[key] == pytest.approx(expected[key], rel=1e-4), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_killed_and_resumed_run_gives_the_same_numbers(runs: Runs, name: str) -> None:
    cut, whole = numbers(runs.cut(name)), numbers(runs.whole(name))
    assert [line["step"] for line in whole if line["kind"] == "train"] == [*range(1, STEPS + 1)]
    assert [line["step"] for line in whole if line["kind"] == "validation"] == [
        *range(3, STEPS, 3),
        STEPS,
    ]
    assert cut == whole  # floats as repr wrote them: every bit


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_did_resume(runs: Runs, name: str) -> None:
    said = runs.said[f"{name}_cut"]
    assert said.code == 0, said.err
    saved = runs.saved[name]
    assert f"resuming after step {saved}," in said.out
    assert f"step {saved + 1}/{STEPS}" in said.out and f"step {saved}/{STEPS}" not in said.out


@pytest.mark.slow
def test_steps_done_in_vain_are_set_aside(runs: Runs) -> None:
    logged = [saved < KILL_AFTER for saved in runs.saved.values()]
    aside = [(runs.cut(name) / "metrics.discarded.jsonl").exists() for name in runs.saved]
    assert all(there for there, expected in zip(aside, logged) if expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_half_written_checkpoints_are_passed_over_and_replaced(runs: Runs, name: str) -> None:
    kept = 2 if "checkpoint.keep=2" in CASES[name][1] else 4
    expected = [f"step_{step:08d}" for step in (4, 8, 12, 16)][-kept:]
    folder = runs.cut(name) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == expected
    for step in expected:
        assert "half of it" not in (folder / step / "metadata.json").read_text()


@pytest.mark.slow
def test_finished_run_started_again_does_nothing_and_says_so(runs: Runs) -> None:
    said = runs.said["again"]
    assert said.code == 0 and not said.err
    assert f"done, {STEPS} of {STEPS} steps; nothing is left to do" in said.out
    assert f"step {STEPS}/" not in said.out
    assert len(entries(runs.cut("fp32"), "train")) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ("other_seed", "was trained with run.seed = 5, not 6"),
        ("other_batch", "train.global_batch_size = 4: set it as it was"),
        ("other_window", "was trained with model.gengram.window = 21, not null: set"),
        ("other_rope", "was trained with model.rotary_base = 10000, not 500: set"),
        ("other_layers", "was trained with model.num_layers = 4, not 5: set"),
    ],
)
def test_what_would_make_it_another_run_is_refused(runs: Runs, job, expected) -> None:
    said = runs.said[job]
    assert said.code == 2
    assert expected in said.err and len(said.err.splitlines()) == 1
    saved = load_config(runs.cut("fp32") / "config.yaml", [], Config)
    assert (saved.run.seed, saved.train.global_batch_size) == (5, 8)  # left as it was


def _facts(step: int) -> Facts:
    return Facts(format=FORMAT, step=step, samples=step, seed=1, layout={})


def _write(store: CheckpointStore, step: int) -> None:
    store.finish(store.begin(step), _facts(step))


def test_old_checkpoints_go_only_when_a_new_one_is_whole(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2):
        _write(store, step)
    partial = store.begin(3)
    assert _checkpoints_in(tmp_path) == [1, 2]
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError("no space")

        patch.setattr("os.rename", fail)
        with pytest.raises(OSError, match="no space"):
            store.finish(partial, _facts(3))
    assert _checkpoints_in(tmp_path) == [1, 2]
    assert store.newest() == store.path(2)
    store.finish(partial, _facts(3))
    assert _checkpoints_in(tmp_path) == [2, 3]
    assert store.newest() == store.path(3)


def test_checkpoint_whose_removal_is_cut_off_is_none_any_more(tmp_path, monkeypatch) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    _write(store, 1)
    partial = store.begin(2)

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            store.finish(partial, _facts(2))
    assert _checkpoints_in(tmp_path) == [2]
    _write(store, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_all_checkpoints_stay_without_keep(tmp_path) -> None:
    store = CheckpointStore(tmp_path, keep=None)
    for step in (1, 2, 30, 4):
        _write(store, step)
    assert _checkpoints_in(tmp_path) == [1, 2, 4, 30]
    assert store.newest() == store.path(30)


def _checkpoints_in(folder: Path) -> list[int]:
    """Steps of the folders that pass for whole checkpoints."""
    return sorted(int(p.name[5:]) for p in folder.iterdir() if p.suffix == "")
