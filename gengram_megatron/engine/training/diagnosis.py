"""Finds where a number that is not finite arose: the rank, and the first layer or parameter there.

This costs nothing until it is needed: the batch is computed a second time, with hooks.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerLayer
from torch import Tensor, nn

from gengram_megatron.engine.model.data_parallel import unwrap
from gengram_megatron.engine.processes import gather


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


def diagnose(chunks: Sequence[nn.Module], compute: Callable[[], object]) -> str:
    """Returns in words what was not finite first, over all ranks. All ranks call this.

    compute: runs forward and backward of the batch once more. Only what a rank computes itself is
    checked, before gradients are summed over ranks.
    """
    search = _Search()
    with ExitStack() as stack:
        for chunk in unwrap(chunks):
            search.watch(stack, chunk)
        compute()
    ranks: list[Finding | None] = gather(min(search.findings, default=None))
    findings = [finding for finding in ranks if finding is not None]
    if not findings:
        return "a second pass over the same batch was finite, so suspect the hardware"
    first = min(findings)
    return f"on rank {first.rank}, {first.text} is not finite"


class _Search:
    """Collects the findings of one rank."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._outputs = 0

    def watch(self, stack: ExitStack, chunk: nn.Module) -> None:
        """Checks the weights of a model chunk, and its outputs and gradients until the stack
        ends."""
        global_name = _global_names(chunk)
        for number, (name, parameter) in enumerate(chunk.named_parameters()):
            if not parameter.isfinite().all():
                self._note(0, number, f"the weight {global_name(name)}")
            handle = parameter.register_hook(self._on_gradient(global_name(name), parameter))
            stack.callback(handle.remove)
        for name, module in chunk.named_modules():
            handle = module.register_forward_hook(self._on_output(global_name(name)))
            stack.callback(handle.remove)

    def _note(self, kind: int, order: int, text: str) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        self.findings.append(Finding(kind, stage, order, dist.get_rank(), text))

    def _on_output(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            self._outputs += 1
            outputs = output if isinstance(output, tuple) else (output,)
            if not all(_finite(tensor) for tensor in outputs):
                self._note(1, self._outputs, f"the output of {name or 'the model'}")

        return check

    def _on_gradient(self, name: str, parameter: nn.Parameter) -> Callable[[Tensor], None]:
        def check(gradient: Tensor) -> None:
            if getattr(parameter, "grad_added_to_main_grad", False):
                # The hook gets only an empty placeholder.
                gradient = getattr(parameter, "main_grad", gradient)
            if not _finite(gradient):
                self._note(2, len(self.findings), f"the gradient of {name}")

        return check


def _finite(value: Any) -> bool:
    return not (torch.is_tensor(value) and value.is_floating_point()) or bool(
        value.isfinite().all()
    )


def _global_names(chunk: nn.Module) -> Callable[[str], str]:
    """Returns a function that renames what belongs to a layer by the layer's number in the whole
    model, from 1."""
    layers = {
        name: f"layer {module.layer_number}"
        for name, module in chunk.named_modules()
        if isinstance(module, TransformerLayer)
    }

    def renamed(name: str) -> str:
        layer = next((p for p in layers if name == p or name.startswith(p + ".")), None)
        return name if layer is None else layers[layer] + name[len(layer) :]

    return renamed
