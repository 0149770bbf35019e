"""Runs in a separate process: builds a model, makes a training step, and prints which parts it uses
and which fused parts megatron-core found.

The config of the model comes as JSON on the standard input; without one, no model is built.
"""

import importlib
import json
import sys

import torch

from gengram_megatron.commands.doctor.ask import Findings
from gengram_megatron.config.layout import check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.engine.model.build import build_model
from gengram_megatron.engine.processes import end_processes, start_processes
from gengram_megatron.engine.training import report
from gengram_megatron.engine.training.engines import build_engine
from gengram_megatron.engine.training.step import forward_backward


def parts(config: Config) -> dict[str, str | None]:
    """Builds a model, makes a step, and returns the implementation of each part, as
    engine/training/report.py reads it from the model and optimizer."""
    layout = check_layout(config, 1)
    start_processes(layout, config.run.seed, 0, config.train.deterministic)
    chunks, optimizer = build_engine(config, layout, build_model(config, layout))
    bases = torch.tensor(config.model.gengram.token_ids[:4]).repeat(config.model.seq_length)
    batch = bases[None, : config.model.seq_length + 1]
    forward_backward(chunks, [batch], config, layout, forward_only=False)
    optimizer.step_if(lambda norm: True)
    implementations = report.part_implementations(chunks, optimizer)
    end_processes()
    return implementations


def extensions() -> Findings:
    """Returns which fused parts megatron-core (0.16.1) looks for when it is imported, with the
    module that looks for each (where) and the package that it uses (found). That may be torch or
    megatron-core itself, or None.
    """
    core = {name: importlib.import_module(f"megatron.core.{name}") for name in _WHERE.values()}
    norms = core["fusions.fused_layer_norm"]
    fusion = core["tensor_parallel.layers"]._grad_accum_fusion_available
    fused_norm = norms.HAVE_FUSED_LAYER_NORM or norms.HAVE_PERSIST_LAYER_NORM
    packages = {
        "Adam": _library(core["optimizer"].Adam),
        "gradient norm": _library(core["optimizer.clip_grads"].l2_norm_impl),
        "layer norm": "apex" if fused_norm else None,
        "gradient accumulation fusion": "fused_weight_gradient_mlp_cuda" if fusion else None,
    }
    return {
        part: {"where": f"megatron.core.{_WHERE[part]}", "found": package}
        for part, package in packages.items()
    }


_WHERE = {
    "Adam": "optimizer",
    "gradient norm": "optimizer.clip_grads",
    "layer norm": "fusions.fused_layer_norm",
    "gradient accumulation fusion": "tensor_parallel.layers",
}


def _library(function: object) -> str:
    """Returns the package that a function or class comes from."""
    module: str = getattr(function, "__module__", None) or type(function).__module__
    return module.split(".")[0]


if __name__ == "__main__":
    given = sys.stdin.read()
    print(
        json.dumps(
            {
                "extensions": extensions(),
                "parts": parts(Config.model_validate_json(given)) if given else None,
            }
        )
    )
