"""The mean of the table rows of all k-mers inside the window (paper section 3.2, equation 6).

At the position that predicts token t the window is {t-W, ..., t-1}; the k-mers that lie wholly
inside end at its last L = W - k + 1 tokens. The mean runs over the valid ones (at least 1).

The sum over a window is built from sums over 1, 2, 4, ... tokens in float32, about 2 log2(L)
additions. Unlike a difference of prefix sums, its rounding does not grow with the length of the
sequence. Nothing but the row numbers is kept for the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.model.gengram.ids import rows_of
from gengram_megatron.model.zigzag import Piece


def window_mean(
    table: Tensor, ids: Tensor, k: int, window: int | None, pieces: list[Piece]
) -> Tensor:
    """Mean of the rows of table k over each position's window.

    table: [5^k, d]; ids: [b, s] of whole sequences; returns [s_local, b, d] in the table's dtype,
    for the positions of `pieces` only. window None: only the k-mer that ends at the position.
    """
    span = 1 if window is None else window - k + 1
    return _WindowMean.apply(table, ids, span, pieces)


class _WindowMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, span, pieces):
        ctx.save_for_backward(ids)
        ctx.span, ctx.pieces, ctx.rows, ctx.dtype = span, pieces, table.shape[0], table.dtype
        out = []
        for piece in pieces:
            own = _with_left_context(ids, piece, span)
            rows = F.embedding(own.clamp(max=ctx.rows - 1), table).to(_wide(table.dtype))
            rows.masked_fill_((own == ctx.rows).unsqueeze(-1), 0)
            total = sliding_sum(rows, span)[-len(piece) :]
            out.append(total.div_(_valid(own, ctx.rows, span, len(piece))).to(table.dtype))
        return out[0] if len(out) == 1 else torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        """A row's gradient: the sum, over the windows that its k-mers lie in, of that window's
        gradient divided by the window's number of valid k-mers."""
        (ids,) = ctx.saved_tensors
        grads, indices, offset = [], [], 0
        for piece in ctx.pieces:
            own = _with_left_context(ids, piece, ctx.span)
            share = grad[offset : offset + len(piece)].to(_wide(grad.dtype))
            share = share / _valid(own, ctx.rows, ctx.span, len(piece))
            # Seen from its last token a k-mer lies in the windows of the next `span` positions.
            ahead = F.pad(share, (0, 0, 0, 0, len(own) - len(piece), 0))
            grads.append(sliding_sum(ahead.flip(0), ctx.span).flip(0))
            indices.append(own)
            offset += len(piece)
        table_grad = torch.ops.aten.embedding_dense_backward(  # deterministic on GPUs too
            torch.cat(grads).flatten(0, 1),
            torch.cat(indices).flatten().long(),
            ctx.rows + 1,
            ctx.rows,
            False,
        )
        return table_grad[: ctx.rows].to(ctx.dtype), None, None, None


def sliding_sum(x: Tensor, span: int) -> Tensor:
    """out[t] = x[t - span + 1] + ... + x[t] along the first axis, nothing before x[0]."""
    total, covered, power, size = None, 0, x, 1
    while True:
        if span & size:
            if total is None:
                total, covered = power.clone(), size
            else:
                total[covered:] += power[: max(len(power) - covered, 0)]
                covered += size
        if covered == span:
            return total
        doubled = power.clone()
        doubled[size:] += power[:-size]
        power, size = doubled, 2 * size


def _with_left_context(ids: Tensor, piece: Piece, span: int) -> Tensor:
    """ids of a piece and of the span - 1 tokens left of it, as [s, b]."""
    return ids[:, max(piece.start - span + 1, 0) : piece.stop].t()


def _valid(ids: Tensor, rows: int, span: int, length: int) -> Tensor:
    """Valid k-mers in the windows of the last `length` positions, at least 1: [s, b, 1]."""
    counts = sliding_sum((ids != rows).to(torch.int32), span)[-length:]
    return counts.clamp_(min=1).unsqueeze(-1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def table_rows(kmer_sizes: tuple[int, ...]) -> int:
    """Rows of all tables together: 19,530 for k = 1..6."""
    return sum(map(rows_of, kmer_sizes))
