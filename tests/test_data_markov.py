"""The Markov models of the benchmark, against counting with dictionaries."""

import importlib.util
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.build import build
from data_prep.schema import DataConfig

SCRIPT = Path(__file__).parent.parent / "benchmarks/markov.py"
spec = importlib.util.spec_from_file_location("markov", SCRIPT)
markov = importlib.util.module_from_spec(spec)
spec.loader.exec_module(markov)


def fragments(folder: Path, split: str, length: int) -> list[str]:
    """The fragments of a split as text, without EOD."""
    tokens = np.fromfile(folder / f"{split}.bin", dtype=np.uint8).reshape(-1, length + 1)
    return ["".join(".....CGTAN"[token] for token in row[:-1]) for row in tokens]


def slow_nats(folder: Path, order: int, length: int) -> float:
    """Count grams of every length up to order + 1; score with the longest clean context."""
    grams: Counter[str] = Counter()
    for text in fragments(folder, "train", length):
        for end in range(2, length + 1):
            grams.update(text[max(end - k, 0) : end] for k in range(1, min(order + 1, end) + 1))
    scores = []
    for text in fragments(folder, "validation", length):
        for place in range(1, length):
            if text[place] == "N":
                continue
            context = text[max(place - order, 0) : place].rsplit("N", 1)[-1]
            total = sum(grams[context + base] for base in "ACGT")
            scores.append(-math.log((grams[context + text[place]] + 1) / (total + 4)))
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def data_set(tmp_path_factory) -> Path:
    """A data set of text in which each base depends on the one before it."""
    folder = tmp_path_factory.mktemp("markov")
    random = np.random.default_rng(3)
    for name in "ab":
        text = ["A"]
        for step in random.choice(4, 6000, p=[0.1, 0.2, 0.3, 0.4]):
            text.append(
                "N" if random.random() < 0.01 else "ACGT"["ACGTN".find(text[-1]) % 4 ^ step]
            )
        (folder / f"{name}.fa").write_text(f">{name}\n{''.join(text)}\n")
    groups = {name: {"sources": {name: {"fasta": f"{name}.fa"}}} for name in "ab"}
    config = DataConfig(
        output=str(folder / "out"), seq_length=20, validation=0.2, max_n_fraction=0.2, groups=groups
    )
    build(config, folder, False, lambda doing, bases: None)
    return folder / "out"


def test_against_dictionaries(data_set, monkeypatch):
    monkeypatch.setattr(markov, "BLOCK", 7)  # so that blocks do not end where the data does
    scores = markov.markov_nats(data_set, [0, 1, 3, 5])
    assert scores == {
        order: pytest.approx(slow_nats(data_set, order, 20), abs=1e-12) for order in (0, 1, 3, 5)
    }
    assert scores[1] < scores[0] < 1.39


def test_the_script_prints_a_line_for_each_order(data_set, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["markov.py", str(data_set), "--orders", "1,3"])
    markov.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["order 1", "order 3"]


def test_what_was_counted_is_kept_for_the_pictures_of_runs(data_set, capsys):
    from gengram_megatron.data_set import read_manifest
    from gengram_megatron.runs.plot import markov_levels

    nats = markov.markov_nats(data_set, [0, 2])
    markov.keep(data_set, nats)
    files = read_manifest(data_set)["files"]
    checksums = {split: files[f"{split}.bin"]["sha256"] for split in ("train", "validation")}
    kept = {"Markov 0": nats[0], "Markov 2": nats[2]}
    assert markov_levels(data_set, checksums) == kept
    assert capsys.readouterr().err == ""
