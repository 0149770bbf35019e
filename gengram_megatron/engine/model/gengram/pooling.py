"""The mean of the table rows of all k-mers in the window (paper section 3.2, equation 6).

At the position that predicts token t the window is {t-W, ..., t-1}; the k-mers that lie entirely
inside it end at its last L = W - k + 1 tokens. The rows of the valid ones are summed in float32 and
divided by their number (at least 1). Only the row ids are kept for the backward pass.

A sum over a window of `span` positions is built from sums over 1, 2, 4, ... positions, with about
2 log2(span) additions of whole tensors. So its rounding error does not grow with the length of the
sequence, as that of a difference of prefix sums does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.config.tables import KmerTable
from gengram_megatron.engine.model.sequence import TokenRange


@dataclass(frozen=True)
class Windows:
    """The windows of s contiguous positions in b sequences.

    span: the number of positions in a window.
    documents: [s, b], or None. If given, a window ends at the border of its document.
    distinct: the ids of the k-mers [s, b], or None. If given, a k-mer that occurs several times in
        a window counts once (the paper's equation 7).
    """

    span: int
    documents: Tensor | None = None
    distinct: Tensor | None = None

    def sums(self, x: Tensor) -> Tensor:
        """Takes x [s, b, d], a row for the k-mer that ends at each position. Returns the sum of the
        rows in each position's window, [s, b, d]."""
        if self.distinct is None:
            return sliding_sum(x, self.span, self.documents)
        total = torch.zeros_like(x)
        for back in range(min(self.span, len(x))):
            total[back:] += x[: len(x) - back] * self._counts(self.distinct, back)
        return total

    def spread(self, x: Tensor) -> Tensor:
        """Applies the adjoint of `sums`: returns for each k-mer the sum of x over the windows that
        contain it, [s, b, d]."""
        if self.distinct is None:
            return sliding_sum(x, self.span, self.documents, ahead=True)
        total = torch.zeros_like(x)
        for back in range(min(self.span, len(x))):
            total[: len(x) - back] += x[back:] * self._counts(self.distinct, back)
        return total

    def _counts(self, distinct: Tensor, back: int) -> Tensor:
        """Returns whether the k-mer at each position counts in the window of the position `back`
        positions later, [s - back, b, 1]: it does if it is the last of its kind in that window and
        in the same document."""
        length = len(distinct) - back
        counts = torch.ones_like(distinct[:length], dtype=torch.bool)
        for ahead in range(1, back + 1):
            counts &= distinct[:length] != distinct[ahead : length + ahead]
        if self.documents is not None:
            counts &= self.documents[:length] == self.documents[back:]
        return counts.unsqueeze(-1)


def sliding_sum(
    x: Tensor, span: int, documents: Tensor | None = None, ahead: bool = False
) -> Tensor:
    """Returns out[t] = x[t - span + 1] + ... + x[t] along the first axis, or with `ahead`
    out[t] = x[t] + ... + x[t + span - 1].

    x: [s, b, d]; it is not modified. Positions outside x count as zero, and with documents [s, b]
    also positions in another document.
    """

    def add_shifted(target: Tensor, source: Tensor, shift: int, out: Tensor) -> Tensor:
        """Writes target + source shifted by `shift` positions to out, which may be target."""
        later, earlier = slice(shift, None), slice(0, max(len(source) - shift, 0))
        to, shifted = (earlier, source[later]) if ahead else (later, source[earlier])
        if documents is not None:
            shifted = shifted * (documents[later] == documents[earlier]).unsqueeze(-1)
        torch.add(target[to], shifted, out=out[to])
        return out

    # power: the sums over `size` positions, a power of two.
    total, covered, power, size = None, 0, x, 1
    while True:
        if span & size:
            if total is None:
                total = power.clone()
            else:
                add_shifted(total, power, covered, out=total)
            covered += size
        if covered == span:
            assert total is not None  # a span is at least 1
            return total
        edge = slice(max(len(power) - size, 0), None) if ahead else slice(0, size)
        doubled = torch.empty_like(power)
        doubled[edge] = power[edge]
        power, size = add_shifted(power, power, size, out=doubled), 2 * size


CPU_BLOCK = 256  # positions per block; 1 MB of float32 at d_m 1024


@dataclass(frozen=True)
class Pooling:
    """The settings of pooling.

    window: W, or None for only the k-mer that ends at the position.
    deduplicate: whether a k-mer that occurs several times in a window counts once (equation 7).
    """

    window: int | None
    deduplicate: bool = False

    def span(self, k: int) -> int:
        """Returns L, the number of positions in a window at which a k-mer can end."""
        return 1 if self.window is None else self.window - k + 1


def pooled_features(
    rows: Sequence[Tensor],
    ids: Sequence[Tensor],
    tables: tuple[KmerTable, ...],
    pooling: Pooling,
    ranges: list[TokenRange],
    documents: Tensor | None,
) -> Tensor:
    """Returns the pooled features in the order of k, [s_local, b, number of k * d / tp].

    rows[i]: rows of tables[i], [rows, columns / tp]; ids[i]: the index of each k-mer's row among
    them, [b, s]. The heads of one k are interleaved, so that a tensor-parallel rank's columns of
    them are contiguous.
    """
    means: dict[int, list[Tensor]] = {}
    for table, table_rows, table_ids in zip(tables, rows, ids):
        mean = window_mean(table_rows, table_ids, table.k, pooling, ranges, documents)
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
    ranges: list[TokenRange],
    documents: Tensor | None = None,
) -> Tensor:
    """Returns the mean of the rows of a table of k-mers over each position's window, for the
    positions of `ranges` only: [s_local, b, d] in the table's dtype.

    table: [rows, d]; ids: [b, s] of whole sequences, `rows` for k-mers that are not valid;
    documents: [b, s], or None; windows end at document borders.
    """
    means: Tensor = _WindowMean.apply(table, ids, documents, k, pooling, ranges)
    return means


class _WindowMean(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        table: Tensor,
        ids: Tensor,
        documents: Tensor | None,
        k: int,
        pooling: Pooling,
        ranges: list[TokenRange],
    ) -> Tensor:
        ctx.save_for_backward(ids, documents)
        blocks = split_into_blocks(ranges, table.is_cuda)
        ctx.k, ctx.pooling, ctx.blocks = k, pooling, blocks
        ctx.rows, ctx.dtype = table.shape[0], table.dtype
        wide, out = _wide(table.dtype), []
        for block in blocks:
            block_ids, windows = _block_windows(ctx, ids, documents, block)
            rows = F.embedding(block_ids.clamp(max=ctx.rows - 1), table).to(wide)
            rows.masked_fill_((block_ids == ctx.rows).unsqueeze(-1), 0)
            total = windows.sums(rows)[-len(block) :]
            out.append(total.div_(_valid_counts(block_ids, ctx.rows, windows, len(block))))
        return torch.cat(out).to(table.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Returns the gradient of the rows. That of a row is the sum, over the windows that contain
        its k-mers, of the window's gradient divided by the window's number of valid k-mers."""
        ids, documents = ctx.saved_tensors
        grads, indices, offset = [], [], 0
        for block in ctx.blocks:
            block_ids, windows = _block_windows(ctx, ids, documents, block)
            share = grad[offset : offset + len(block)].to(_wide(grad.dtype))
            share = share / _valid_counts(block_ids, ctx.rows, windows, len(block))
            left = len(block_ids) - len(block)
            grads.append(windows.spread(F.pad(share, (0, 0, 0, 0, left, 0))))
            indices.append(block_ids)
            offset += len(block)
        table_grad = torch.ops.aten.embedding_dense_backward(  # deterministic on GPUs too
            torch.cat(grads).flatten(0, 1),
            torch.cat(indices).flatten().long(),
            ctx.rows + 1,
            ctx.rows,
            False,
        )
        return table_grad[: ctx.rows].to(ctx.dtype), None, None, None, None, None


def split_into_blocks(ranges: list[TokenRange], on_gpu: bool) -> list[TokenRange]:
    """Splits the ranges on a CPU, so that the sums over a block stay in its cache. On a GPU returns
    them unchanged."""
    if on_gpu:
        return ranges
    return [
        TokenRange(start, min(start + CPU_BLOCK, token_range.stop))
        for token_range in ranges
        for start in range(token_range.start, token_range.stop, CPU_BLOCK)
    ]


def _block_windows(
    ctx: Any, ids: Tensor, documents: Tensor | None, block: TokenRange
) -> tuple[Tensor, Windows]:
    """Returns the ids [s, b] of a block and of the span - 1 tokens to its left, and the windows
    over them."""
    span = ctx.pooling.span(ctx.k)
    positions = slice(max(block.start - span + 1, 0), block.stop)
    block_ids = ids[:, positions].t()
    return block_ids, Windows(
        span,
        documents=None if documents is None else documents[:, positions].t(),
        distinct=block_ids if ctx.pooling.deduplicate else None,
    )


def _valid_counts(ids: Tensor, rows: int, windows: Windows, length: int) -> Tensor:
    """Returns the number of valid k-mers, at least 1, in the windows of the last `length`
    positions, [length, b, 1]."""
    counts = windows.sums((ids != rows).to(torch.int32).unsqueeze(-1))[-length:]
    return counts.clamp_(min=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
