"""The mean of the table rows of all k-mers inside the window (paper section 3.2, equation 6).

At the position that predicts token t the window is {t-W, ..., t-1}; the k-mers that lie wholly
inside end at its last L = W - k + 1 tokens. The mean runs over the valid ones (at least 1), summed
in float32. Nothing but the row numbers is kept for the backward pass.

A sum over a window of `span` positions is built from sums over 1, 2, 4, ... positions, about
2 log2(span) additions of whole tensors, so its rounding does not grow with the length of the
sequence, as that of a difference of prefix sums does.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.config.tables import KmerTable
from gengram_megatron.engine.model.sequence import TokenRange


@dataclass(frozen=True)
class Windows:
    """The windows of s neighbouring positions, of b sequences.

    documents: [s, b] or None. Where given, a window ends at the border of its document.
    distinct: [s, b] or None. Where given, the ids of the k-mers, and a k-mer that occurs several
        times in a window counts once (the paper's equation 7).
    """

    span: int
    documents: Tensor | None = None
    distinct: Tensor | None = None

    def sums(self, x: Tensor) -> Tensor:
        """x: [s, b, d], a row for the k-mer that ends at each position; returns [s, b, d], the
        sum of the rows in each position's window."""
        if self.distinct is None:
            return sliding_sum(x, self.span, self.documents)
        total = torch.zeros_like(x)
        for back in range(min(self.span, len(x))):
            total[back:] += x[: len(x) - back] * self._counts(back)
        return total

    def spread(self, x: Tensor) -> Tensor:
        """The adjoint: for each k-mer, the sum of x over the windows that it lies in."""
        if self.distinct is None:
            return sliding_sum(x, self.span, self.documents, ahead=True)
        total = torch.zeros_like(x)
        for back in range(min(self.span, len(x))):
            total[: len(x) - back] += x[back:] * self._counts(back)
        return total

    def _counts(self, back: int) -> Tensor:
        """[s - back, b, 1]: whether the k-mer at each position counts in the window of the
        position `back` places later: the last of its kind there, and in the same document."""
        length = len(self.distinct) - back
        counts = torch.ones_like(self.distinct[:length], dtype=torch.bool)
        for ahead in range(1, back + 1):
            counts &= self.distinct[:length] != self.distinct[ahead : length + ahead]
        if self.documents is not None:
            counts &= self.documents[:length] == self.documents[back:]
        return counts.unsqueeze(-1)


def sliding_sum(
    x: Tensor, span: int, documents: Tensor | None = None, ahead: bool = False
) -> Tensor:
    """out[t] = x[t - span + 1] + ... + x[t] along the first axis, or with `ahead` x[t] + ... +
    x[t + span - 1]; nothing outside of x and, with documents [s, b], nothing of another document.
    x: [s, b, d]; x itself is left as it is."""

    def plus_shifted(target: Tensor, source: Tensor, shift: int, out: Tensor) -> Tensor:
        """target + source moved by `shift`, into out, which may be target."""
        near, far = slice(shift, None), slice(0, max(len(source) - shift, 0))
        at, moved = (far, source[near]) if ahead else (near, source[far])
        if documents is not None:
            moved = moved * (documents[near] == documents[far]).unsqueeze(-1)
        torch.add(target[at], moved, out=out[at])
        return out

    total, covered, power, size = None, 0, x, 1
    while True:
        if span & size:
            if total is None:
                total = power.clone()
            else:
                plus_shifted(total, power, covered, out=total)
            covered += size
        if covered == span:
            return total
        edge = slice(max(len(power) - size, 0), None) if ahead else slice(0, size)
        doubled = torch.empty_like(power)
        doubled[edge] = power[edge]
        power, size = plus_shifted(power, power, size, out=doubled), 2 * size


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
    pieces: list[TokenRange],
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
    pieces: list[TokenRange],
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


def blocks(pieces: list[TokenRange], on_gpu: bool) -> list[TokenRange]:
    """The pieces, on a CPU cut so that the sums over a block stay in its cache."""
    if on_gpu:
        return pieces
    return [
        TokenRange(start, min(start + CPU_BLOCK, piece.stop))
        for piece in pieces
        for start in range(piece.start, piece.stop, CPU_BLOCK)
    ]


def _windows_of(
    ctx, ids: Tensor, documents: Tensor | None, piece: TokenRange
) -> tuple[Tensor, Windows]:
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
