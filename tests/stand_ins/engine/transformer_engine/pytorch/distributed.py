"""Recomputation of activations."""

from contextlib import contextmanager

import torch.utils.checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


class CudaRNGStatesTracker:
    """megatron-core derives one of its own trackers from it, and uses another."""


@contextmanager
def activation_recompute_forward(activation_recompute=False, recompute_phase=False):
    """Keeps scales of fp8 for the second pass; there are none here."""
    yield


def checkpoint(
    function,
    *args,
    distribute_saved_activations=False,
    get_rng_state_tracker=None,
    tp_group=None,
    **kwargs,
):
    """Calls a function now, and again in the backward pass, in fp8 if it was so."""
    recipe = FP8GlobalStateManager.get_fp8_recipe()

    def again(*inputs, **named):
        with fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe):
            return function(*inputs, **named)

    return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=False, **kwargs)
