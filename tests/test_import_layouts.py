"""Imported weights are those that a run starts from, whatever its layout."""

import shutil

import pytest

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.exchange.importing import import_model
from tests.published_model import published_model, save_ranks
from tests.training.launch import run_jobs
from tests.training.tiny import build_data, losses, write_config

# The first step of a warm-up has a learning rate of 0: what is validated are the first weights.
FIRST = ("train.steps=1", "optimizer.warmup_fraction=0.5", "checkpoint.at_end=false")
LAYOUTS = {
    "one": (1, ()),
    "tp2_pp2_vpp2": (
        4,
        ("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    ),
}


@pytest.mark.slow
def test_run_starts_from_imported_weights_in_any_layout(one_process, tmp_path) -> None:
    data = build_data(tmp_path / "dna_64")
    file = write_config(tmp_path / "tiny.yaml", data)
    config = load_config(file, [f"run.dir={tmp_path / 'imported'}"], Config)
    save_ranks(published_model(config, one_process), config, tmp_path / "there", 2, 2)
    import_model(tmp_path / "there", config)
    found = {}
    for name, (processes, settings) in LAYOUTS.items():
        shutil.copytree(tmp_path / "imported", tmp_path / name)
        words = ["train", str(file), f"run.dir={tmp_path / name}", *FIRST, *settings]
        [first, *_] = run_jobs(processes, {name: words}, tmp_path / f"{name}_jobs")[name]
        assert first.code == 0, first.err
        found[name] = losses(tmp_path / name) + losses(tmp_path / name, "validation")
    # A published model of random weights is far from uniform; drawn weights would be near it.
    assert found["one"][0] > 4
    assert found["tp2_pp2_vpp2"] == pytest.approx(found["one"], rel=1e-5)
