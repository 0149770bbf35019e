"""`gengram sweep`: a file to its runs, the runs to their results."""

import csv
import json
import math
import re
import signal
from pathlib import Path

import matplotlib
import pytest
import yaml
from matplotlib.figure import Figure
from typer.testing import CliRunner

from gengram_megatron.commands.cli import app
from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.errors import UserError
from gengram_megatron.sweep.plot import _draw_line, plot_results, series
from gengram_megatron.sweep.runs import read_sweep
from tests.layouts.launch import ROOT
from tests.plan.configs import SWEEPS
from tests.training.launch import gengram, start, wait_for
from tests.training.tiny import DENSE, RUN, build_data, entries, losses, write_config

HEAD = """\
base: tiny.yaml
run: {dir: runs/windows}
"""


@pytest.fixture
def written(tmp_path: Path):
    """Writes a sweep file around the tiny run; its path."""
    write_config(tmp_path / "tiny.yaml", tmp_path / "dna")

    def write(sweep: str) -> Path:
        file = tmp_path / "sweep.yaml"
        file.write_text(HEAD + sweep)
        return file

    return write


def refused(file: Path) -> str:
    with pytest.raises(UserError) as error:
        read_sweep(file, [])
    return str(error.value)


def test_every_combination_and_every_named_run(written) -> None:
    file = written("""\
sweep:
  grid:
    model.gengram.layers: [[1], [2, 3]]
    model.gengram.window: [null, 21]
  runs:
    baseline: {model.gengram.enabled: false}
    small: {model: {gengram: {dim: 4}}, optimizer.lr: 1e-3}
""")
    found = read_sweep(file, ["train.steps=7"])
    assert {run.name: run.settings for run in found.runs} == {
        f"layers-{word}_window-{window or 'null'}": {
            "model.gengram.layers": layers,
            "model.gengram.window": window,
        }
        for word, layers in (("1", [1]), ("2-3", [2, 3]))
        for window in (None, 21)
    } | {
        "baseline": {"model.gengram.enabled": False},
        "small": {"model": {"gengram": {"dim": 4}}, "optimizer.lr": 1e-3},
    }
    for run in found.runs:  # each is what key=value words would have made of the shared config
        words = [f"{key}={json.dumps(value)}" for key, value in run.settings.items()]
        words += [f"run.dir=runs/windows/{run.name}", "train.steps=7"]
        assert run.config == load_config(file.parent / "tiny.yaml", words, Config)


def test_seeds_repeat_every_run(written) -> None:
    file = written("""\
sweep:
  grid: {model.gengram.window: [6, 7]}
  runs: {baseline: {model.gengram.enabled: false}}
  seeds: [3, 4]
""")
    assert [(run.name, run.group, run.config.run.seed) for run in read_sweep(file, []).runs] == [
        (f"{name}_seed-{seed}", name, seed)
        for name in ("window-6", "window-7", "baseline")
        for seed in (3, 4)
    ]


def test_keys_of_equal_last_words_are_named_in_full(written) -> None:
    grid = "{optimizer.weight_decay: [0.1], optimizer.tables.weight_decay: [0.0]}"
    name = read_sweep(written(f"sweep: {{grid: {grid}}}"), []).runs[0].name
    assert name == "optimizer.weight_decay-0.1_optimizer.tables.weight_decay-0.0"


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ("sweep:\n  grid:\n    model.gengram.windw: [6]", ":5: there is no key model.gengram.windw"),
        ("sweep:\n  grid:\n    model.gengram.window: [6,\n      x]", ":6: model.gengram.window is"),
        ("sweep:\n  grid:\n    train..steps: [6]", ":5: 'train..steps' is not a key"),
        ("sweep:\n  runs:\n    a: {run.dir: b}", ":5: 'run.dir' is not a key"),
        ("sweep:\n  grid:\n    train.steps: 6", ":5: sweep.grid.train.steps is 6; it must be a list"),
        ("sweep:\n  grids: {}", ":4: there is no key sweep.grids; did you mean sweep.grid?"),
        ("sweep:\n  runs:\n    a/b: {}", "has an entry 'a/b'; such names must"),
        ("sweep: {}", "the sweep is empty; give sweep.grid or sweep.runs"),
        ("", "use `gengram train"),
        (
            "sweep:\n  grid: {train.steps: [6, 6]}",
            "two runs of the sweep would share the folder steps-6",
        ),
    ],
)  # fmt: skip
def test_mistakes_name_the_line(written, sweep: str, said: str) -> None:
    assert said in refused(written(sweep))


def test_layout_of_every_run_is_checked(written) -> None:
    file = written("sweep: {grid: {model.gengram.window: [6, 21, 4]}}")
    done = CliRunner().invoke(app, ["sweep", str(file)])
    assert "model.gengram.window is 4, too small" in str(done.exception)


@pytest.mark.parametrize("file", SWEEPS, ids=str)
def test_shipped_sweeps_are_listed(file: Path) -> None:
    done = CliRunner().invoke(app, ["sweep", str(file), "--list"])
    assert done.exit_code == 0, done.exception
    runs = read_sweep(file, []).runs
    assert f"{len(runs)} runs" in done.output and done.output.count("to do") == len(runs)


def test_paper_s_sweeps_have_the_paper_s_runs() -> None:
    layers, windows = (
        read_sweep(ROOT / f"configs/sweeps/{name}_50b_8k.yaml", []).runs
        for name in ("layers", "windows")
    )
    memory = [run.config.model.gengram for run in layers]
    assert [(m.layers, m.window) for m in memory[:-1]] == [([n], None) for n in range(1, 13)]
    assert [m.enabled for m in memory] == [True] * 12 + [False]
    wanted = [None, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21, 22, 24, 26, 27, 28, 30]
    assert [run.config.model.gengram.window for run in windows] == wanted
    for run in layers + windows:
        assert run.config.train.samples == 6_103_515
        assert (run.config.model.hidden_size, run.config.model.num_experts) == (1024, 8)
    assert all(run.config.model.gengram.layers == [10] for run in windows)


def test_array_of_runs_that_need_other_machines_is_refused(written) -> None:
    file = written("sweep: {grid: {optimizer.overlap_grad_reduce: [true, false]}}")
    words = ["sweep", str(file), "--launch", "--slurm", "launch.processes=1"]
    assert "cannot be one Slurm array" in str(CliRunner().invoke(app, words).exception)


def test_array_in_a_dry_run(written) -> None:
    file = written("sweep: {grid: {train.steps: [3, 4, 5]}, at_a_time: 2}")
    words = ["sweep", str(file), "--launch", "--slurm", "--dry-run", "launch.processes=2"]
    script = CliRunner().invoke(app, words).output
    assert "#SBATCH --array=0-2%2" in script.splitlines()
    assert "#SBATCH --job-name=windows" in script.splitlines()
    for steps in (3, 4, 5):
        assert f"  {Path.cwd() / 'runs/windows'}/steps-{steps}" in script.splitlines()


def row(name: str, loss: float | None, **settings) -> dict:
    return {"group": name, "loss": loss, "settings": settings}


def test_lines_of_the_figure() -> None:
    found = [
        row("a", 1.0, layers=[1], window=6, **{"run.seed": 1}),
        row("a", 1.1, layers=[1], window=6, **{"run.seed": 2}),
        row("b", 1.2, layers=[1], window=None),
        row("c", 1.3, layers=[3, 6], window=6),
        row("baseline", 1.4, enabled=False),
    ]
    assert series(found, "layers") == (
        {"window 6": {"1": [1.0, 1.1], "3, 6": [1.3]}, "window null": {"1": [1.2]}},
        {"baseline": [1.4]},
    )
    assert series(found[-1:], None) == ({"": {"baseline": [1.4]}}, {})


def test_seeds_are_dots_around_their_mean() -> None:
    axes = Figure().subplots()
    _draw_line(axes, "C0", "a", {"6": [1.0, 1.2], "8": [1.4, 1.5]}, ["6", "8"])
    means, dots = (line.get_xydata().tolist() for line in axes.lines)
    assert means == [[0, pytest.approx(1.1)], [1, pytest.approx(1.45)]]
    assert dots == [[0, 1.0], [0, 1.2], [1, 1.4], [1, 1.5]]


@pytest.mark.parametrize("name, slanted", [("run", False), ("a_run_with_a_long_name", True)])
def test_names_below_the_figure_are_slanted_where_they_would_overlap(tmp_path, name, slanted):
    out = tmp_path / "results.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_results([row(f"{name}_{number}", 1.3) for number in range(8)], None, out)
    texts = re.findall(rf"<text ([^>]*)>{name}_\d</text>", out.read_text())
    assert len(texts) == 8
    assert [("rotate(-40" in text) for text in texts] == [slanted] * 8


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, Path]:
    """A sweep that was told to stop in its first run, and launched again; its file and folder."""
    folder = tmp_path_factory.mktemp("swept")
    data = build_data(tmp_path_factory.getbasetemp() / "dna_64")
    sweep = {
        **RUN,
        "run": {"seed": 5, "dir": str(folder / "runs")},
        "data": {"path": str(data), "workers": 0},
        "sweep": {
            "grid": {"model.gengram.window": [None]},
            "runs": {"baseline": {"model.gengram.enabled": False}},
        },
    }
    file, output = folder / "sweep.yaml", folder / "first.log"
    file.write_text(yaml.safe_dump(sweep))
    words = ["sweep", str(file), "--launch", *DENSE, "train.steps=30", "launch.cpus=1"]
    first = start(1, words, output)
    metrics = folder / "runs/window-null/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text(), first, output)
    first.send_signal(signal.SIGTERM)
    assert first.wait(300) == 75, output.read_text()
    assert not (folder / "runs/baseline").exists()
    done = gengram(*words, "--results")
    assert done.code == 0, done.out + done.err
    assert "2 runs, 0 finished" in done.out and "run 2 of 2: baseline" in done.out
    assert "resuming after step" in done.out
    return file, folder / "runs"


@pytest.mark.slow
def test_results_are_the_validation_losses(swept: tuple[Path, Path]) -> None:
    _, folder = swept
    found = json.loads((folder / "results.json").read_text())
    assert [one["name"] for one in found] == ["window-null", "baseline"]
    for one in found:
        run = folder / one["name"]
        assert [line["step"] for line in entries(run, "train")] == [*range(1, 31)]
        assert [one["loss"]] == losses(run, "validation")
        assert one["bits_per_base"] == pytest.approx(one["loss"] / math.log(2))
        assert (one["state"], one["tokens"]) == ("finished", 30 * 8 * 64)
    table = list(csv.DictReader((folder / "results.csv").open()))
    assert [float(one["loss"]) for one in table] == [one["loss"] for one in found]
    assert table[1]["model.gengram.enabled"] == "False"
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finished_runs_are_left_alone(swept: tuple[Path, Path]) -> None:
    file, folder = swept
    wide = CliRunner(env={"COLUMNS": "200"})  # tables whose cells stay on one line
    words = ["sweep", str(file), "--launch", *DENSE, "train.steps=30"]
    metrics = folder / "baseline/metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    done = wide.invoke(app, words)
    assert done.exit_code == 0 and "2 runs, 2 finished" in done.output
    assert metrics.stat().st_mtime_ns == before
    longer = wide.invoke(app, ["sweep", str(file), *DENSE, "train.steps=40"])
    assert longer.output.count("other train.steps") == 2
    other = wide.invoke(app, [*words, "optimizer.lr=0.5"])
    assert "was trained with other values of optimizer.lr" in str(other.exception)
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:20]))
    assert "step 20 of 30" in wide.invoke(app, [*words[:2], *words[3:]]).output
