"""What a model of some implementation computes, by the names that checkpoints have."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gengram_megatron.config.layout import Layout, check_layout
from gengram_megatron.config.schema import Config
from gengram_megatron.tokenizer import BASE_IDS
from tests.exchange_models import build, load
from tests.training.tiny import DENSE, MHA, MLA

LOW_RANK = (*MLA, "model.mla.q_lora_rank=16")
KINDS = {
    "gqa_dense": DENSE,
    "gqa_moe": (),
    "mha_dense": (*MHA, *DENSE),
    "mha_moe": MHA,
    "mla_dense": (*MLA, *DENSE),
    "mla_moe": LOW_RANK,
}
"""All with memory in the middle layers (tests/training/tiny.py)."""
RECOMPUTED = {
    "gqa_dense": "full",
    "gqa_moe": "selective",
    "mha_dense": "selective",
    "mha_moe": "full",
    "mla_dense": "full",
    "mla_moe": "selective",
}
FP8 = ("model.mla.qk_pos_emb_head_dim=16",)
"""Sides of matrices that fp8 can use."""
LAYOUTS = {
    "tensor, dense": ("gqa_dense", "parallel.tensor=2"),
    "tensor, latent": ("mla_moe", "parallel.tensor=2"),
    "expert": ("gqa_moe", "parallel.expert=2"),
    "whole experts": ("mha_moe", "parallel.tensor=2", "parallel.expert_tensor=1"),
    "pipeline": ("mla_dense", "parallel.pipeline=2"),
    "context": ("mha_dense", "parallel.context=2", "train.precision=bf16"),
}
"""Of two processes: a kind, and how it is split."""
SOME = ("gqa_dense", "mla_moe")
"""Kinds that together have all modules."""


def observe(config: Config) -> dict:
    """A step without its update, on one process: weights and their gradients, each [global shape],
    by name; the loss; the line of implementations' parts; and how often each layer was in fp8."""
    from megatron.core.utils import unwrap_model

    from gengram_megatron.engine.training.report import part_implementations

    layout = check_layout(config, 1)
    chunks, optimizer, _ = build(config, layout)
    loss = _compute(chunks, config, layout, seed=1)
    weights, gradients = {}, {}
    for name, place, weight, gradient in _pieces(unwrap_model(chunks)[0]):
        for found, piece in ((weights, weight), (gradients, gradient)):
            if name not in found:
                found[name] = torch.zeros(place[1])
            found[name][place[0]] = piece.float()
    counted = {
        name.replace("module.", ""): module.passes_in_fp8
        for name, module in chunks[0].named_modules()
        if hasattr(module, "passes_in_fp8")
    }
    return {
        "loss": loss,
        "weights": weights,
        "gradients": gradients,
        "parts": part_implementations(chunks, optimizer),
        "passes_in_fp8": counted,
    }


def built(config: Config) -> list[tuple[str, tuple, Tensor]]:
    """This rank's initial weights: name; its first element in the whole, and the shape of that; the
    weight."""
    from gengram_megatron.engine.model.build import build_model
    from gengram_megatron.engine.model.initialize import sharded_parameters

    [chunk] = build_model(config, check_layout(config, 2))
    return [
        (piece.key, (piece.global_offset, piece.global_shape), piece.data.detach().clone())
        for piece, _, _ in sharded_parameters(chunk)
    ]


@torch.no_grad()
def _pieces(chunk) -> Iterator[tuple[str, tuple, Tensor, Tensor]]:
    from gengram_megatron.engine.model.initialize import sharded_parameters

    for piece, parameter, first in sharded_parameters(chunk):
        gradient = parameter.main_grad.flatten()[first : first + piece.data.numel()]
        place = piece.global_slice(), piece.global_shape
        yield piece.key, place, piece.data, gradient.view(piece.local_shape)


def same_model(found: dict, expected: dict, tolerance: float) -> None:
    """The same weights by the same names, and the same gradients up to rounding."""
    assert abs(found["loss"] - expected["loss"]) <= tolerance * expected["loss"]
    for kind in ("weights", "gradients"):
        assert found[kind].keys() == expected[kind].keys()
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name
    for name, gradient in expected["gradients"].items():
        error = (found["gradients"][name] - gradient).norm()
        assert error <= tolerance * gradient.norm(), name


def diagnosed(config: Config) -> str:
    """What is said of a batch whose numbers are all finite."""
    from gengram_megatron.engine.training.diagnosis import diagnose

    layout = check_layout(config, 1)
    chunks, _, _ = build(config, layout)
    return diagnose(chunks, lambda: _compute(chunks, config, layout, seed=1))


def go_on(config: Config, steps: int, save: bool = True) -> list[float]:
    """Their losses, after the newest checkpoint of the run's folder; and a new one."""
    from gengram_megatron.engine.checkpoint.state import TrainingState

    layout = check_layout(config, 1)
    chunks, optimizer, schedule = build(config, layout)
    state = TrainingState(config, layout, chunks, optimizer, schedule, [])
    start, losses = state.load_newest().step, []
    for step in range(start + 1, start + steps + 1):
        chunks[0].zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(_compute(chunks, config, layout, seed=step))
        optimizer.step()
        schedule.step(config.train.global_batch_size)
    if save:
        state.save(start + steps, required=True)
    return losses


def _compute(chunks: list, config: Config, layout: Layout, seed: int) -> float:
    from gengram_megatron.engine.training.step import forward_backward

    generator = torch.Generator().manual_seed(seed)
    shape = (layout.num_microbatches, config.train.micro_batch_size, config.model.seq_length + 1)
    batch = torch.tensor(BASE_IDS)[torch.randint(5, shape, generator=generator)]
    total, count = forward_backward(chunks, batch, config, layout, forward_only=False)
    return float(total / count)


def configs(folder: Path, implementation: str) -> Iterator[tuple[str, Config]]:
    """Of all models that are observed. fp8 is computed by Transformer Engine, and compared with
    bf16 of torch."""
    own = f"model.implementation={implementation}"
    fp8 = "bf16" if implementation == "torch" else "fp8"
    for kind, words in KINDS.items():
        yield kind, load(folder, kind, own, *words)
        again = f"train.recompute={RECOMPUTED[kind]}"
        yield f"{kind}, recomputed", load(folder, kind, own, *words, again)
        words = (*words, *FP8, again, f"train.precision={fp8}")
        yield f"{kind}, fp8", load(folder, kind, own, *words)
