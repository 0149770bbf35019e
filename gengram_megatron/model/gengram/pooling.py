"""The mean of the table rows of all k-mers inside the window (paper section 3.2, equation 6).

At the position that predicts token t the window is {t-W, ..., t-1}; the k-mers that lie wholly
inside end at its last L = W - k + 1 tokens. The mean runs over the valid ones (at least 1), summed
in float32 (`windows.py`). Nothing but the row numbers is kept for the backward pass.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.config.tables import KmerTable
from gengram_megatron.model.gengram.windows import Windows
from gengram_megatron.model.zigzag import Piece

CPU_BLOCK = 256  # positions; 1 MB of float32 at d_m 1024


@dataclass(frozen=True)
class Pooling:
    """How rows are pooled: everything but the table and the ids.

    window: W, or None: only the k-mer that ends at the position.
    deduplicate: a k-mer that occurs several times in a window counts once (equation 7).
    """

    window: int | None
    deduplicate: bool = False

    def span(self, k: int) -> int:
        """L, the places in a window where a k-mer can end."""
        return 1 if self.window is None else self.window - k + 1


def pooled(
    rows: list[Tensor],
    ids: list[Tensor],
    tables: tuple[KmerTable, ...],
    pooling: Pooling,
    pieces: list[Piece],
    documents: Tensor | None,
) -> Tensor:
    """The pooled features, k after k: [s_local, b, number of k * d / tp]. The heads of one k are
    interleaved, so that a tensor-parallel rank's columns of them are neighbours."""
    means: dict[int, list[Tensor]] = {}
    for table, own, places in zip(tables, rows, ids):
        mean = window_mean(own, places, table.k, pooling, pieces, documents)
        means.setdefault(table.k, []).append(mean)
    return torch.cat(
        [
            heads[0] if len(heads) == 1 else torch.stack(heads, dim=-1).flatten(-2)
            for heads in means.values()
        ],
        dim=-1,
    )


def window_mean(
    table: Tensor,
    ids: Tensor,
    k: int,
    pooling: Pooling,
    pieces: list[Piece],
    documents: Tensor | None = None,
) -> Tensor:
    """Mean of the rows of a table of k-mers over each position's window.

    table: [rows, d]; ids: [b, s] of whole sequences, `rows` for k-mers that are not valid;
    documents: [b, s], windows end at their borders; returns [s_local, b, d], for the positions of
    `pieces` only, in the table's dtype.
    """
    return _WindowMean.apply(table, ids, documents, k, pooling, pieces)


class _WindowMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, ids, documents, k, pooling, pieces):
        ctx.save_for_backward(ids, documents)
        pieces = blocks(pieces, table.is_cuda)
        ctx.k, ctx.pooling, ctx.pieces = k, pooling, pieces
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        wide, out = _wide(table.dtype), []
        for piece in pieces:
            own, windows = _windows_of(ctx, ids, documents, piece)
            rows = F.embedding(own.clamp(max=ctx.rows - 1), table).to(wide)
            rows.masked_fill_((own == ctx.rows).unsqueeze(-1), 0)
            total = windows.sums(rows)[-len(piece) :]
            out.append(total.div_(_valid(own, ctx.rows, windows, len(piece))))
        return torch.cat(out).to(table.dtype)

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


def blocks(pieces: list[Piece], on_gpu: bool) -> list[Piece]:
    """The pieces, on a CPU cut so that the sums over a block stay in its cache."""
    if on_gpu:
        return pieces
    return [
        Piece(start, min(start + CPU_BLOCK, piece.stop))
        for piece in pieces
        for start in range(piece.start, piece.stop, CPU_BLOCK)
    ]


def _windows_of(ctx, ids: Tensor, documents: Tensor | None, piece: Piece) -> tuple[Tensor, Windows]:
    """ids [s, b] of a piece and of the span - 1 tokens left of it, and the windows over them."""
    span = ctx.pooling.span(ctx.k)
    here = slice(max(piece.start - span + 1, 0), piece.stop)
    own = ids[:, here].t()
    return own, Windows(
        span,
        documents=None if documents is None else documents[:, here].t(),
        distinct=own if ctx.pooling.deduplicate else None,
    )


def _valid(ids: Tensor, rows: int, windows: Windows, length: int) -> Tensor:
    """Valid k-mers in the windows of the last `length` positions, at least 1: [s, b, 1]."""
    counts = windows.sums((ids != rows).to(torch.int32).unsqueeze(-1))[-length:]
    return counts.clamp_(min=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
