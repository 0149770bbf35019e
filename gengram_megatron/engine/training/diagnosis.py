"""Finds where a number that is not finite arose: the rank, and the first layer or parameter there.

This costs nothing until it is needed: the batch is computed a second time, with hooks.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerLayer
from torch import Tensor, nn

from gengram_megatron.engine.model.data_parallel import unwrapped


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is not finite. Findings sort by what comes first in a step: weights before
    outputs before gradients, then by pipeline stage and by order within it.

    Attributes:
        kind: 0, a weight; 1, an output; 2, a gradient.
        stage: the pipeline stage.
        order: position among the rank's weights, outputs or gradients.
        text: what is not finite, in words.
    """

    kind: int
    stage: int
    order: int
    rank: int
    text: str


def diagnose(chunks: list, compute: Callable[[], object]) -> str:
    """Returns in words what was not finite first, over all ranks. Called by all ranks.

    compute: runs forward and backward of the batch once more. Only what a rank computes itself is
    checked, before gradients are summed over ranks.
    """
    search = _Search()
    with ExitStack() as stack:
        for chunk in unwrapped(chunks):
            search.watch(stack, chunk)
        compute()
    findings = [None] * dist.get_world_size()
    dist.all_gather_object(findings, min(search.findings, default=None))
    findings = [finding for finding in findings if finding is not None]
    if not findings:
        return "a second pass over the same batch was finite, so suspect the hardware"
    first = min(findings)
    return f"on rank {first.rank}, {first.text} is not finite"


class _Search:
    """Collects the findings of one rank."""

    def __init__(self):
        self.findings: list[Finding] = []
        self._outputs = 0

    def watch(self, stack: ExitStack, chunk: nn.Module) -> None:
        names = _global_names(chunk)
        for number, (name, parameter) in enumerate(names(chunk.named_parameters())):
            if not parameter.isfinite().all():
                self._note(0, number, f"the weight {name}")
            handle = parameter.register_hook(self._on_gradient(name, parameter))
            stack.callback(handle.remove)
        for name, module in names(chunk.named_modules()):
            handle = module.register_forward_hook(self._on_output(name))
            stack.callback(handle.remove)

    def _note(self, kind: int, order: int, text: str) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.findings.append(Finding(kind, stage, order, dist.get_rank(), text))

    def _on_output(self, name: str):
        def check(module: nn.Module, inputs: tuple, output) -> None:
            self._outputs += 1
            outputs = output if isinstance(output, tuple) else (output,)
            if not all(_finite(tensor) for tensor in outputs):
                self._note(1, self._outputs, f"the output of {name or 'the model'}")

        return check

    def _on_gradient(self, name: str, parameter: nn.Parameter):
        def check(gradient: Tensor) -> None:
            if getattr(parameter, "grad_added_to_main_grad", False):
                gradient = parameter.main_grad  # the hook gets only an empty placeholder
            if not _finite(gradient):
                self._note(2, len(self.findings), f"the gradient of {name}")

        return check


def _finite(value) -> bool:
    return not (torch.is_tensor(value) and value.is_floating_point()) or bool(
        value.isfinite().all()
    )


def _global_names(chunk: nn.Module):
    """Returns a function that renames what belongs to a layer by the layer's number in the whole
    model, from 1."""
    layers = {
        name: f"layer {module.layer_number}"
        for name, module in chunk.named_modules()
        if isinstance(module, TransformerLayer)
    }

    def renamed(named):
        for name, value in named:
            layer = next((p for p in layers if name == p or name.startswith(p + ".")), None)
            yield (name if layer is None else layers[layer] + name[len(layer) :], value)

    return renamed
