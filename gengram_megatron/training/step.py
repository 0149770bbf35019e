"""One step: forward and backward of all microbatches through megatron-core's schedule."""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from gengram_megatron.config.layout import Layout
from gengram_megatron.config.schema import Config
from gengram_megatron.config.tables import kmer_tables
from gengram_megatron.data.batches import split_batch
from gengram_megatron.model.gengram.ids import KmerIds
from gengram_megatron.model.gengram.touched import RowsTouched
from gengram_megatron.model.zigzag import context_pieces, take
from gengram_megatron.tokenizer import EOD


def forward_backward(
    chunks: list,
    batches: Iterator[Tensor],
    config: Config,
    layout: Layout,
    forward_only: bool,
    touched: RowsTouched | None = None,
) -> Tensor | None:
    """Run a global batch; returns the sum of the losses of this data-parallel rank's samples and
    the number of scored tokens, [2] float64, on the last pipeline stage, and None elsewhere.

    batches: microbatches [b, L + 1] of this data-parallel rank. Every rank of a pipeline, tensor
    and context group reads the same ones: token ids must reach all layers with memory.
    touched: marks the table rows that the microbatches look up.
    """
    schedule = get_forward_backward_func()
    with torch.set_grad_enabled(not forward_only):  # which the schedules leave as it is
        reports = schedule(
            forward_step_func=partial(forward_step, config=config, touched=touched),
            # One iterator a chunk: each walks the microbatches on its own.
            data_iterator=_iterators(batches, layout),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=layout.num_microbatches,
            seq_length=config.model.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=forward_only,
        )
    return torch.stack([r["loss"] for r in reports]).sum(0) if reports else None


def forward_step(batches: Iterator[Tensor], model, config: Config, touched: RowsTouched | None):
    """megatron-core's forward_step_func: the output, and the function that makes it a loss."""
    tokens = next(batches).to(torch.cuda.current_device(), non_blocking=True)
    inputs, labels, loss_mask = split_batch(tokens)
    gengram, kmers = config.model.gengram, None
    if gengram.enabled:
        kmers = KmerIds.of(
            inputs,
            kmer_tables(gengram),
            gengram.token_ids,
            eod=EOD if gengram.reset_at_document else None,
        )
        if touched is not None:
            touched.mark(kmers)
    pieces = context_pieces(
        inputs.shape[1],
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    position_ids = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    output = model(
        input_ids=take(inputs, pieces, 1),
        position_ids=take(position_ids, pieces, 1),
        attention_mask=None,
        labels=take(labels, pieces, 1),
        extra_block_kwargs={"attention_bias": kmers},
    )
    return output, partial(loss, mask=take(loss_mask, pieces, 1), scored=loss_mask.sum())


def loss(token_losses: Tensor, mask: Tensor, scored: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over the scored tokens of a microbatch.

    token_losses, mask: [b, s_local]; scored: how many tokens of the microbatch count, over all
    context-parallel ranks. Every sample has the same number (a fragment ends in one EOD), so the
    mean over microbatches and ranks is the mean over tokens. megatron-core multiplies by the
    context-parallel size and averages over data- and context-parallel ranks, which together make
    the sum over the context-parallel ranks that is meant.
    """
    total = (token_losses.float() * mask).sum()
    report = torch.stack([total.detach().double(), mask.sum().double()])
    return total / scored.clamp(min=1), {"loss": report}


def _iterators(batches: Iterator[Tensor], layout: Layout):
    if layout.virtual_pipeline is None:
        return batches
    own = [next(batches) for _ in range(layout.num_microbatches)]
    return [iter(own) for _ in range(layout.virtual_pipeline)]
