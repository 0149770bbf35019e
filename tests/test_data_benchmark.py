"""The benchmark of data preparation: what it compares with does the same work, and its sums."""

import importlib.util
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import dnaio
import numpy as np
import pytest
import sentencepiece

from data_prep.inspect.opened import DataSet

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


benchmark, json_pipeline = program("data_preparation"), program("json_pipeline")


def test_the_pipeline_writes_every_base(tmp_path):
    text = "".join(np.random.default_rng(1).choice([*"ACGTNacgt"], 1000))
    (tmp_path / "a.fa").write_text(f">r1\n{text[:500]}\n{text[500:]}\n>r2\n{text[:70]}\n")
    measured = benchmark.pipeline(tmp_path, [tmp_path / "a.fa"], Namespace(seq_length=64))
    assert 0 < measured["json_lines"] + measured["tokenize"] < measured["seconds"]
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(tmp_path / "pipeline/train"))
    assert dataset.index.dtype == np.uint16
    expected = [text[start : start + 64].upper() for start in range(0, 937, 64)]
    expected.append(text[:64].upper())
    assert len(dataset) == len(expected)
    model = sentencepiece.SentencePieceProcessor(model_proto=json_pipeline.train_model())
    for document, fragment in zip([dataset[number] for number in range(len(dataset))], expected):
        assert "".join(model.id_to_piece(int(token)) for token in document[:-1]) == fragment
        assert document[-1] == len(model)


def test_the_sources_hold_the_dna(tmp_path):
    dna = benchmark.read_dna(None, 9_000_000, tmp_path)
    shipped = "".join(benchmark.sequences(benchmark.SAMPLES))
    assert len(shipped) == 8_029_745
    assert dna == shipped + shipped[: 9_000_000 - len(shipped)]
    files = benchmark.write_sources(tmp_path / "sources", dna[:1000], 2)
    for kind in ("plain", "gzip"):
        for number, path in enumerate(files[kind]):
            with dnaio.open(path, fileformat="fasta") as reader:
                (record,) = reader
            assert (record.name, record.sequence) == (f"copy{number}", dna[:1000])
    assert benchmark.read_dna(str(files["gzip"][1]), 5, tmp_path) == dna[:1000]
    assert benchmark.read_dna(files["plain"][0].as_uri(), 5, tmp_path) == dna[:1000]


def test_memory_counts_children_at_their_peak():
    child = "import time; x = bytearray(80 << 20); time.sleep(0.6); del x; time.sleep(0.2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}]); print(5)"
    measured, printed = benchmark.run_measured([sys.executable, "-c", parent])
    assert 80 << 20 < measured["memory"] < 200 << 20
    assert measured["seconds"] > 0.8 and printed == "5\n"


def test_a_command_that_fails_ends_the_benchmark():
    with pytest.raises(SystemExit, match="failed"):
        benchmark.run_measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_medians_and_projection(monkeypatch):
    runs = [
        {
            "start": {"seconds": 2.0, "memory": 1},
            **{
                f"build {kind}": {"seconds": ours, "memory": 10 * ours}
                for kind in ("plain", "gzip")
            },
            **{
                f"pipeline {kind}": {"seconds": theirs, "tokenize": theirs / 2, "memory": 7}
                for kind in ("plain", "gzip")
            },
        }
        for ours, theirs in ((4, 40), (3, 90), (8, 40))
    ]
    found = benchmark.medians(runs, 1000, 500)["plain"]
    assert found["build_bases_per_second"] == 250
    assert found["build_without_start"] == 500
    assert found["pipeline_bases_per_second"] == 12.5
    assert found["times_the_pipeline"] == 20  # of 20, 60 and 10: it had half the bases
    assert found["times_tokenize_alone"] == 10
    assert (found["build_memory"], found["pipeline_memory"]) == (80, 7)
    # 449.5 Gbp at 100 Mbp/s on two cores: 4,495 s; on 16 an eighth
    monkeypatch.setattr(benchmark, "hash_rate", lambda: 1e9)
    assert benchmark.hours(100e6, 2, 16) == pytest.approx(4495 / 8 / 3600)
    assert benchmark.hours(100e6, 2, 64) == pytest.approx(449.5 / 3600)  # as fast as it is hashed


def test_the_build_writes_the_same_documents(tmp_path):
    """Ours and the pipeline take the same fragments, but for those at the validation border."""
    files = benchmark.write_sources(tmp_path, benchmark.read_dna(None, 50_000, tmp_path), 2)
    arguments = Namespace(seq_length=512, words=["seed=7"])
    measured = benchmark.build(tmp_path, files["plain"], arguments)
    assert measured["seconds"] > 0 and measured["memory"] > 1 << 20
    facts = DataSet(tmp_path / "built").facts
    assert facts.settings.seed == 7
    splits = facts.splits
    written = splits["train"].fragments + splits["validation"].fragments
    assert 2 * (50_000 // 512) - 2 <= written <= 2 * (50_000 // 512)
