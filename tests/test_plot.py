"""loss.png: what it shows of which kind of run, and what is written in it."""

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from gengram_megatron.config.schema import Config
from gengram_megatron.runs.plot import (
    UNIFORM,
    _limits,
    _smooth,
    markov_levels,
    plot_loss,
    run_title,
    short_number,
    write_markov_levels,
)

MARKOV = {"Markov 1": 1.3486, "Markov 3": 1.3350, "Markov 5": 1.3192}


def entries(losses, validations: dict[int, float] | None = None) -> list[dict]:
    """The lines of metrics.jsonl of a run with 100 tokens a step."""
    found = []
    for step, loss in enumerate(losses, start=1):
        place = {"step": step, "samples": step, "tokens": 100 * step}
        found.append({"kind": "train", **place, "loss": float(loss)})
        if step in (validations or {}):
            found.append({"kind": "validation", **place, "loss": validations[step]})
    return found


def write(folder: Path, lines: list[dict]) -> Path:
    folder.mkdir(exist_ok=True)
    words = {True: "NaN", False: None}
    safe = [{k: words[v != v] or v for k, v in line.items()} for line in lines]
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in safe))
    return path


def falling(start: float, end: float, steps: int, scale: float, deviation: float = 0.0):
    """A loss that comes down within about `scale` steps."""
    noise = np.random.default_rng(1).normal(0, deviation, steps)
    return end + (start - end) * np.exp(-np.arange(steps) / scale) + noise


# What of the loss is shown

LONG = entries(falling(5.5, 0.95, 6000, 200, 0.012), {3000: 0.96, 6000: 0.951})
SHORT = entries(falling(5.5, 1.31, 80, 8, 0.004), {80: 1.318})
WARM_UP = entries(falling(5.5, 1.3, 12, 10))
ABOVE = entries(falling(5.5, 1.52, 300, 10), {300: 1.525})
BROKEN = entries([*falling(5.5, 1.3, 200, 10), *[math.nan] * 100], {100: 1.31, 300: math.nan})
SPIKE = entries([*falling(5.5, 1.3, 300, 10), *[4.0] * 20, *[1.3] * 80])
OVERFITTED = entries(falling(5.5, 0.7, 500, 20), {500: 1.6})


@pytest.mark.parametrize(
    ("runs", "levels", "bottom", "top"),
    [
        ([LONG], {}, 0.95, 1.05),  # the last tenth of a nat, however high it began
        ([LONG], MARKOV, 0.95, 1.05),  # lines above it do not stretch it
        ([SHORT], {}, 1.31, 1.41),
        ([SHORT], {"Markov 9": 1.29}, 1.29, 1.41),  # a line below is what is to be reached
        ([WARM_UP], {}, UNIFORM, 4.3),  # all of it but its start, down to uniform letters
        ([ABOVE], {}, UNIFORM, 1.62),
        ([BROKEN], {}, 1.30, 1.40),
        ([SPIKE], {}, 1.30, 1.40),
        ([OVERFITTED], {}, 0.70, 1.60),  # the last validation too
        ([LONG, SHORT], {}, 0.95, UNIFORM),
        ([SHORT, ABOVE], {}, 1.31, 1.525),
        ([[]], {}, UNIFORM, UNIFORM + 0.1),
        ([entries([math.nan])], {}, UNIFORM, UNIFORM + 0.1),
        ([entries([5.0])], {}, UNIFORM, 5.1),
    ],
)
def test_the_picture_shows_where_the_curves_end(runs, levels, bottom, top):
    low, high = _limits(runs, {"uniform": UNIFORM, **levels})
    assert low < high
    margin = 0.05 * (top - bottom) + 0.01 * (1 + 10 * (top > 2))
    assert bottom - margin <= low <= bottom
    assert top - 0.01 <= high <= top + 2 * margin


def test_the_running_mean_leaves_out_what_is_not_finite():
    loss = np.arange(200.0)
    loss[[50, 120]] = math.nan
    smooth = _smooth(loss)  # over 5 steps
    assert smooth[10] == 10
    assert smooth[50] == pytest.approx(np.mean([48, 49, 51, 52]))
    assert smooth[0] == 1 and smooth[-1] == 198
    assert np.isnan(_smooth(np.full(9, math.nan))).all()


# What is written in it


def texts(path: Path) -> list[str]:
    """All texts of an SVG picture."""
    return [
        "".join(element.itertext()).strip()
        for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    ]


def drawn(tmp_path, runs: dict[str, list[dict]], *arguments) -> list[str]:
    paths = {name: write(tmp_path / name, lines) for name, lines in runs.items()}
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot_loss(paths, tmp_path / "loss.svg", *arguments)
    return texts(tmp_path / "loss.svg")


def test_title_levels_and_both_last_losses_are_written(tmp_path):
    found = drawn(tmp_path, {"run": SHORT}, MARKOV, "runs/smoke\n4.54 M parameters")
    last = _smooth(np.array([e["loss"] for e in SHORT if e["kind"] == "train"]))[-1]
    for text in (
        "runs/smoke",
        "4.54 M parameters",
        "uniform letters 1.3863",
        "Markov 3 1.3350",
        f"training {last:.4f}",
        "validation 1.3180",
    ):
        assert text in found
    assert "uniform letters 1.3863" in drawn(tmp_path, {"run": SHORT})


def test_levels_above_the_picture_and_close_ones_share_a_text(tmp_path):
    assert "above: uniform letters 1.3863, Markov 1 1.3486, Markov 3 1.3350, Markov 5 1.3192" in (
        drawn(tmp_path, {"run": LONG}, MARKOV)
    )
    assert "uniform letters 1.3863, Markov 1 1.3486, Markov 3 1.3350, Markov 5 1.3192" in (
        drawn(tmp_path, {"run": WARM_UP}, MARKOV)
    )


def test_runs_side_by_side_and_broken_ones(tmp_path):
    found = drawn(tmp_path, {"one": SHORT, "two": BROKEN, "empty": [], "point": entries([5.0])})
    for text in (
        "one validation 1.3180",
        "two training not finite",
        "two validation not finite",
        "two not finite: 100 steps",
        "point training 5.0000",
    ):
        assert text in found
    assert not any(text.startswith("empty") for text in found)


def test_nothing_half_written_is_left(tmp_path):
    out = tmp_path / "loss.png"
    plot_loss({"run": write(tmp_path / "run", BROKEN)}, out)
    assert out.read_bytes().startswith(b"\x89PNG")
    plot_loss({"run": write(tmp_path / "run", [])}, out)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["loss.png"]


def test_the_title_says_what_a_run_is():
    config = Config.model_validate(
        {
            "run": {"dir": "/home/someone/runs/mine"},
            "model": {
                "hidden_size": 1024,
                "num_layers": 12,
                "num_attention_heads": 16,
                "num_query_groups": 8,
                "ffn_hidden_size": 4096,
                "num_experts": 8,
                "seq_length": 8192,
            },
            "data": {"path": "data"},
            "train": {"global_batch_size": 1024, "steps": 1},
        }
    )
    name, what = run_title(config, 50_000_000_000).split("\n")
    assert name == "runs/mine"
    for part in ("1.25 B parameters", "340 M", "2 of 8 experts", "without Gengram", "50 B tokens"):
        assert part in what
    config.model.gengram.enabled, config.model.num_experts = True, None
    name, what = run_title(config, 819_200).split("\n")
    assert "Gengram in layers 3, 6, 10" in what and "819 k tokens" in what
    assert "activated" not in what


@pytest.mark.parametrize(
    "number, shown",
    [(0, "0"), (512, "512"), (999.6, "1 k"), (999_600, "1 M"), (1_249e6, "1.25 B"), (3e12, "3 T")],
)
def test_numbers_for_people(number, shown):
    assert short_number(number) == shown


# Markov levels of a data set


def test_markov_levels_are_those_counted_on_these_very_splits(tmp_path):
    checksums = {"train": "ab", "validation": "cd"}
    assert markov_levels(tmp_path, checksums) == {}
    write_markov_levels(tmp_path, checksums, {1: 1.3486, 12: 1.25})
    assert markov_levels(tmp_path, checksums) == {"Markov 1": 1.3486, "Markov 12": 1.25}
    assert markov_levels(tmp_path, {**checksums, "train": "ef"}) == {}
    (file,) = tmp_path.iterdir()
    for damage in ("", "[]", '{"sha256": {}}', '{"sha256": {}, "nats": 3}', "\x00"):
        file.write_text(damage)
        assert markov_levels(tmp_path, {}) == {}
