"""The losses that keep the experts' load even, collected from the layers."""

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import (
    clear_aux_losses_tracker,
    get_moe_layer_wise_logging_tracker,
    reduce_aux_losses_tracker_across_ranks,
)


def balance_losses(num_layers: int, num_microbatches: int) -> dict[str, float]:
    """load_balance_loss and router_z_loss of the step, each the mean over layers, microbatches and
    ranks, and without its coefficient (1.0 is a perfect balance). Empty for a dense model."""
    tracker = get_moe_layer_wise_logging_tracker()
    if not tracker:
        return {}
    if "z_loss" in tracker:  # megatron-core 0.16 leaves it that of a rank's own tokens
        everyone = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        tracker["z_loss"]["avg_group"] = everyone
    reduce_aux_losses_tracker_across_ranks()
    names = {"load_balancing_loss": "load_balance_loss", "z_loss": "router_z_loss"}
    losses = {
        ours: (tracker[theirs]["values"].sum() / (num_layers * num_microbatches)).item()
        for theirs, ours in names.items()
        if theirs in tracker
    }
    clear_aux_losses_tracker()
    return losses
