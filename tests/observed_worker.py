"""A process of its own that observes models: which libraries megatron-core uses is decided when it
is imported.

    python -m tests.observed_worker transformer_engine FOLDER
    python -m tests.observed_worker apex FOLDER
    python -m tests.observed_worker layouts FOLDER   # as one of two ranks, torchrun's variables set

FOLDER/observed.pt is what it found. Whoever starts it has put a stand-in on the path, and given it
a folder of its own.
"""

import sys
from pathlib import Path

import torch

from gengram_megatron.config.layout import check_layout, world_size_from_environment
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.processes import end_processes, start_processes
from tests.exchange_models import load
from tests.observed import KINDS, LAYOUTS, SOME, built, configs, diagnosed, go_on, observe


def transformer_engine(folder: Path) -> dict:
    """Models of all kinds; runs that torch began, and runs for torch to go on with."""
    found = {name: observe(config) for name, config in configs(folder, "transformer_engine")}
    own = "model.implementation=transformer_engine"
    found["diagnosis"] = diagnosed(load(folder, "diagnosed", own))
    for kind in SOME:
        begun, own_run = f"{kind}_of_torch", f"{kind}_of_engine"
        found[begun] = go_on(load(folder, begun, own, *KINDS[kind]), steps=2, save=False)
        found[own_run] = go_on(load(folder, own_run, own, *KINDS[kind]), steps=2)
    found["torch"] = observe(load(folder, "torch", "train.recompute=selective"))
    fp8 = (own, "train.precision=fp8", "train.recompute=selective")
    found["fp8"] = go_on(load(folder, "fp8", *fp8), steps=4, save=False)
    found["fp8, cut"] = [
        loss for _ in range(2) for loss in go_on(load(folder, "fp8_cut", *fp8), steps=2)
    ]
    return found


def apex(folder: Path) -> dict:
    """Layers of torch. That there is a GPU is pretended to the one function that asks for it."""
    from gengram_megatron.engine.model import build

    build.apex_fusion_available = lambda: True
    return {
        name: observe(config)
        for name, config in configs(folder, "torch")
        if name.startswith(SOME) and not name.endswith("recomputed")
    }


def layouts(folder: Path) -> dict:
    """What one of two ranks builds of Transformer Engine's layers; they compute nothing."""
    from megatron.core import parallel_state

    found = {}
    for name, (kind, *split) in LAYOUTS.items():
        words = (*KINDS[kind], *split, "model.implementation=transformer_engine")
        config = load(folder, "unused", *words)
        parallel_state.destroy_model_parallel()
        start(config)
        found[name] = built(config)
    return found


def start(config: Config) -> None:
    """The groups of its layout."""
    size, rank = world_size_from_environment()
    start_processes(check_layout(config, size), seed=1, rank=rank)


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    start(load(folder, "unused"))
    found = {"transformer_engine": transformer_engine, "apex": apex, "layouts": layouts}[what](
        folder
    )
    torch.save(found, folder / "observed.pt")
    end_processes()
