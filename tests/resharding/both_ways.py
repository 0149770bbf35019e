"""One rank that writes the same state twice: as runs do, and as megatron-core by itself would."""

import os
from pathlib import Path

import torch.distributed as dist

from gengram_megatron.config.load import load_config
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.processes import end_processes
from tests.resharding.cases import DATA, EXPERT, HASHED, LAYOUTS, PLAIN, TABLES
from tests.resharding.worker import TinyRun

OVERLAP = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
BF16 = "train.precision=bf16"
DENSE = "model.num_experts=null"

# name: (layout, settings)
CASES = {
    "dp2": ("dp2", (BF16, *OVERLAP)),
    "dp2_hashed_rows": ("dp2", (*DATA, *HASHED)),
    "cp2": ("cp2", ()),
    "ep2": ("ep2", (*EXPERT, BF16)),
    "dp4": ("dp4", (DENSE, *DATA)),
    "dp2_tp2_ep2": ("tp2_ep2", OVERLAP),
    "dp2_pp2": ("pp2", (DENSE,)),
    "plain": ("dp2", (PLAIN,)),
}


def processes(name: str) -> int:
    return 4 if name in ("dp4", "dp2_tp2_ep2", "dp2_pp2") else 2


def write(name: str, file: Path, out: Path) -> None:
    """OUT/<name>: checkpoints after each of three steps, the last one also as `gathered`."""
    layout, settings = CASES[name]
    words = [*LAYOUTS[layout][1], *settings, TABLES, "train.steps=4", f"run.dir={out / name}"]
    config, ranks = load_config(file, words, Config), processes(name)
    store = dist.FileStore(str(out / f"{name}.store"), ranks)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=ranks)
    run = TinyRun(config, ranks)
    for step in range(1, 4):
        run.steps(step - 1, 1)
        assert run.state.save(step, required=True) is None and run.state.wait() is None
    _gather(run, out / name / "gathered")
    end_processes()


def _gather(run: TinyRun, folder: Path) -> None:
    """With the optimizer's states gathered on all ranks that share them."""
    from megatron.core import dist_checkpointing

    contents = run.state.contents
    if run.config.optimizer.overlap_param_gather:
        for chunk in run.chunks:
            chunk.disable_forward_pre_hook()
    model = contents._model_state()
    optimizer = run.optimizer.sharded_state_dict(model, metadata=contents._metadata())
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save({**model, "optimizer": optimizer}, str(folder))
