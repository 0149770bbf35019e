"""A process of its own that observes models: which libraries megatron-core uses is decided when it
is imported.

    python -m tests.observed_worker transformer_engine FOLDER
    python -m tests.observed_worker apex FOLDER

The folder gets observed.pt. Whoever starts it has put a stand-in on the path.
"""

import sys
from pathlib import Path

import torch

from gengram_megatron.config.layout import check_layout
from gengram_megatron.training.processes import end_processes, start_processes
from tests.exchange_models import load
from tests.observed import KINDS, RESUMED, configs, diagnosed, go_on, observe


def transformer_engine(folder: Path) -> dict:
    """Models of all kinds; runs that torch began, and runs for torch to go on with."""
    found = {name: observe(config) for name, config in configs(folder, "transformer_engine")}
    own = "model.implementation=transformer_engine"
    found["diagnosis"] = diagnosed(load(folder, "diagnosed", own))
    for kind in RESUMED:
        begun, own_run = f"{kind}_of_torch", f"{kind}_of_engine"
        found[begun] = go_on(load(folder, begun, own, *KINDS[kind]), steps=2, save=False)
        found[own_run] = go_on(load(folder, own_run, own, *KINDS[kind]), steps=2)
    fp8 = (own, "train.precision=fp8", "train.recompute=selective")
    found["fp8"] = go_on(load(folder, "fp8", *fp8), steps=4, save=False)
    found["fp8, cut"] = [
        loss for _ in range(2) for loss in go_on(load(folder, "fp8_cut", *fp8), steps=2)
    ]
    return found


def apex(folder: Path) -> dict:
    """Layers of torch. That there is a GPU is pretended to the one function that asks for it."""
    from gengram_megatron.model import build

    build.apex_adds_up = lambda: True
    return {
        name: observe(config)
        for name, config in configs(folder, "torch")
        if not name.endswith("recomputed")
    }


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    start_processes(check_layout(load(folder, "unused"), 1), seed=1, rank=0)
    torch.save(
        {"transformer_engine": transformer_engine, "apex": apex}[what](folder),
        folder / "observed.pt",
    )
    end_processes()
