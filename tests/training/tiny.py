"""A tiny run: its data set, its config file, and how its results are read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from tests.layouts.launch import ROOT

# Four layers with memory on both sides of a pipeline cut, float32, two validations.
RUN = {
    "run": {"seed": 5},
    "model": {
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 32,
        "num_experts": 4,
        "seq_length": 64,
        "vocab_size": 32,
        "init_std": 0.1,
        "gengram": {"enabled": True, "layers": [2, 3], "dim": 8, "init": "scaled", "init_std": 0.5},
    },
    "data": {"workers": 0},
    # So few steps at so high a rate multiply rounding, the more the longer Adam's memory.
    "optimizer": {"lr": 1e-2, "min_lr": 1e-3, "warmup_fraction": 0.0, "beta2": 0.95},
    "train": {
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "steps": 4,
        "precision": "fp32",
        "validation_samples": 12,  # a batch and a half
    },
}
DENSE = ("model.num_experts=null",)
MHA = ("model.attention=mha", "model.num_query_groups=null")
MLA = (
    "model.attention=mla",
    "model.num_query_groups=null",
    "model.mla={kv_lora_rank: 16, qk_head_dim: 8, qk_pos_emb_head_dim: 8, v_head_dim: 16}",
)


def environment() -> dict[str, str]:
    """Of the processes that tests start: this checkout, one thread each, nobody's ranks."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "400"}


def build_data(folder: Path, seq_length: int = 64) -> Path:
    """The shipped DNA in fragments of so many bases; built once a session."""
    if not folder.exists():
        words = (f"output={folder}", f"seq_length={seq_length}")
        _gengram_data("build", "configs/data/sample.yaml", *words)
    return folder


def _gengram_data(*words: str) -> None:
    program = "from data_prep.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def write_config(path: Path, data: Path) -> Path:
    """The tiny run as a config file that lacks only run.dir."""
    path.write_text(yaml.safe_dump({**RUN, "data": {**RUN["data"], "path": str(data)}}))
    return path


def entries(run: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl, all or those of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def numbers(run: Path, kind: str | None = None) -> list[dict]:
    """What must not change from run to run: all measured numbers but those of the clock."""
    clock = ("seconds", "tokens_per_second", "data_wait", "save_stall")
    clock += ("model_flops_utilisation", "peak_memory_bytes")  # on GPUs
    return [{k: v for k, v in e.items() if k not in clock} for e in entries(run, kind)]


def losses(run: Path, kind: str = "train") -> list[float]:
    return [entry["loss"] for entry in entries(run, kind)]


def write_few(folder: Path) -> None:
    """A data set of eight random fragments to learn by heart, and two to validate with."""
    draw = np.random.default_rng(3)
    records = {name: "".join(draw.choice([*"ACGT"], 64 * n)) for name, n in (("a", 8), ("b", 2))}
    fasta = folder.with_suffix(".fa")
    fasta.write_text("".join(f">{name}\n{bases}\n" for name, bases in records.items()))
    source = {"fasta": str(fasta), "validation_records": ["b"]}
    config = {
        "output": str(folder),
        "seq_length": 64,
        "groups": {"all": {"sources": {"random": source}}},
    }
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    _gengram_data("build", str(file))
