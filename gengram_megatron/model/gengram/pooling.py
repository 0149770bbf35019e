"""The mean of the table rows of all k-mers inside the window (paper section 3.2, equation 6).

At the position that predicts token t the window is {t-W, ..., t-1}; the k-mers that lie wholly
inside end at its last L = W - k + 1 tokens. The mean runs over the valid ones (at least 1), summed
in float32 (`windows.py`). Nothing but the row numbers is kept for the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.model.gengram.windows import Windows
from gengram_megatron.model.zigzag import Piece


def window_mean(
    table: Tensor,
    ids: Tensor,
    k: int,
    window: int | None,
    pieces: list[Piece],
    documents: Tensor | None = None,
    deduplicate: bool = False,
) -> Tensor:
    """Mean of the rows of table k over each position's window.

    table: [5^k, d]; ids: [b, s] of whole sequences; documents: [b, s], windows end at their
    borders; returns [s_local, b, d] in the table's dtype, for the positions of `pieces` only.
    window None: only the k-mer that ends at the position. deduplicate: a k-mer that occurs several
    times in a window counts once (equation 7).
    """
    span = 1 if window is None else window - k + 1
    return _WindowMean.apply(table, ids, documents, span, deduplicate, pieces)


class _WindowMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, documents, span, deduplicate, pieces):
        ctx.save_for_backward(ids, documents)
        ctx.span, ctx.deduplicate, ctx.pieces = span, deduplicate, pieces
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        out = []
        for piece in pieces:
            own, windows = _windows_of(ctx, ids, documents, piece)
            rows = F.embedding(own.clamp(max=ctx.rows - 1), table).to(_wide(table.dtype))
            rows.masked_fill_((own == ctx.rows).unsqueeze(-1), 0)
            total = windows.sums(rows)[-len(piece) :]
            out.append(total.div_(_valid(own, ctx.rows, windows, len(piece))).to(table.dtype))
        return out[0] if len(out) == 1 else torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        """A row's gradient: the sum, over the windows that its k-mers lie in, of that window's
        gradient divided by the window's number of valid k-mers."""
        ids, documents = ctx.saved_tensors
        grads, indices, offset = [], [], 0
        for piece in ctx.pieces:
            own, windows = _windows_of(ctx, ids, documents, piece)
            share = grad[offset : offset + len(piece)].to(_wide(grad.dtype))
            share = share / _valid(own, ctx.rows, windows, len(piece))
            grads.append(windows.spread(F.pad(share, (0, 0, 0, 0, len(own) - len(piece), 0))))
            indices.append(own)
            offset += len(piece)
        table_grad = torch.ops.aten.embedding_dense_backward(  # deterministic on GPUs too
            torch.cat(grads).flatten(0, 1),
            torch.cat(indices).flatten().long(),
            ctx.rows + 1,
            ctx.rows,
            False,
        )
        return table_grad[: ctx.rows].to(ctx.dtype), None, None, None, None, None


def _windows_of(ctx, ids: Tensor, documents: Tensor | None, piece: Piece) -> tuple[Tensor, Windows]:
    """ids [s, b] of a piece and of the span - 1 tokens left of it, and the windows over them."""
    here = slice(max(piece.start - ctx.span + 1, 0), piece.stop)
    own = ids[:, here].t()
    return own, Windows(
        ctx.span,
        documents=None if documents is None else documents[:, here].t(),
        distinct=own if ctx.deduplicate else None,
    )


def _valid(ids: Tensor, rows: int, windows: Windows, length: int) -> Tensor:
    """Valid k-mers in the windows of the last `length` positions, at least 1: [s, b, 1]."""
    counts = windows.sums((ids != rows).to(torch.int32).unsqueeze(-1))[-length:]
    return counts.clamp_(min=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
