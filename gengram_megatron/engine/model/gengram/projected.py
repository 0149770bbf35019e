"""Keys and values from tables that are projected once per step, instead of from the features of
each token.

A microbatch then needs look-ups and sums of rows of width 2 h, and no matrix product. The products
are computed once per step over the rows of the tables, and once more for their gradients. That is
less work if a rank has more tokens per step than the tables have rows per k (3,255 for k up to 6).
It needs two more float32 buffers [rows, 2 h] per layer: the projected rows and their gradient.

Look-up, mean and projection are linear, so the maps to key and value can be applied to the tables
(19,530 rows for k up to 6) instead of to the features of each token: P_k = M_k W_k^T. Let L_k be
the number of positions in a window at which a k-mer can end. A window in which all k-mers are valid
(a complete window) gives

    sum over k of 1/L_k * (the sum of P_k over the last L_k k-mers).

The lowest digits of a k-mer's number are the shorter k-mers that end at the same token, and the
highest digits are the shorter k-mers at its start. So tables of shorter k-mers can be folded into
those of longer ones. With K the longest k:

    Q_k[i] = P_k[i] / L_k + Q_{k-1}[i mod 5^(k-1)]   the k-mer and the shorter ones at its end
    E_k[i] = Q_k[i] + E_{k-1}[i div 5]               those, and the ones before them in the window

The window is then the sum of L_K rows of Q_K and one row of E_{K-1}: 17 rows for W = 21 and k up to
6, instead of 111. The term of a single k-mer is P_k[i] / L_k = Q_k[i] - Q_{k-1}[i mod 5^(k-1)].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.config.tables import ALPHABET_SIZE
from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.pooling import Pooling, sliding_sum, split_into_blocks
from gengram_megatron.engine.model.gengram.projection import KeyValueProjection
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.gengram.tables import Tables
from gengram_megatron.engine.model.sequence import TokenRange


@dataclass(frozen=True)
class FoldedRows:
    """Where the rows of Q_1 .. Q_K and E_{K-1} lie in one tensor [rows, 2 h]."""

    longest: int
    pooling: Pooling

    def slice_of(self, k: int) -> slice:
        """Returns the rows of Q_k."""
        first = self.first(k)
        return slice(first, first + ALPHABET_SIZE**k)

    def first(self, k: int) -> int:
        """Returns the first row of Q_k, which comes after Q_1 .. Q_{k-1}."""
        return int((ALPHABET_SIZE**k - ALPHABET_SIZE) // (ALPHABET_SIZE - 1))

    @property
    def edge(self) -> slice:
        """The rows of E_{K-1}; empty if windows contain one k-mer of each k, or if K is 1."""
        first = self.first(self.longest + 1)
        has_edge = self.pooling.window is not None and self.longest > 1
        return slice(first, first + has_edge * ALPHABET_SIZE ** (self.longest - 1))

    @property
    def total(self) -> int:
        """The total number of rows."""
        return int(self.edge.stop)


def fold(
    rows: FoldedRows,
    tables: Sequence[Tensor],
    weight: Tensor,
    reduce: Callable[[Tensor], None],
) -> Tensor:
    """Projects and folds the tables. Returns Q_1 .. Q_K, E_{K-1}: [rows.total, 2 h], in float32 or
    the weight's dtype if that is wider.

    tables[k - 1]: [5^k, d / tp]; weight: [2 h, K, d / tp]; reduce: sums a tensor over the
    tensor-parallel ranks, in place.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide)
    folded = weight.new_empty(rows.total, len(weight))
    for k, table in enumerate(tables, start=1):
        projected = folded[rows.slice_of(k)]
        if k > 1:
            projected.unflatten(0, (ALPHABET_SIZE, -1)).copy_(folded[rows.slice_of(k - 1)])
        projected.addmm_(
            table.to(wide),
            weight[:, k - 1].t(),
            beta=0 if k == 1 else 1,
            alpha=1 / rows.pooling.span(k),
        )
    reduce(folded[: rows.edge.start])
    if rows.total > rows.edge.start:
        edge = folded[rows.slice_of(1)]
        for k in range(2, rows.longest):
            longer = folded[rows.slice_of(k)].unflatten(0, (-1, ALPHABET_SIZE))
            edge = (longer + edge.unsqueeze(1)).flatten(0, 1)
        folded[rows.edge] = edge
    return folded


def unfold(
    rows: FoldedRows, grad: Tensor, tables: Sequence[Tensor], weight: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Applies the adjoint of `fold`. Returns the gradients of the tables and of the weight.

    grad: the gradient of fold's result, summed over the ranks. It is overwritten.
    """
    edge = grad[rows.edge]
    if len(edge):
        for k in range(rows.longest - 1, 0, -1):
            grad[rows.slice_of(k)] += edge
            edge = edge.unflatten(0, (-1, ALPHABET_SIZE)).sum(1)
    weight = weight.to(grad.dtype)
    table_grads: list[Tensor] = []
    weight_grad = torch.empty_like(weight)
    for k in range(rows.longest, 0, -1):
        projected, scale = grad[rows.slice_of(k)], 1 / rows.pooling.span(k)
        if k > 1:
            grad[rows.slice_of(k - 1)] += projected.unflatten(0, (ALPHABET_SIZE, -1)).sum(0)
        table = tables[k - 1].to(grad.dtype)
        table_grads.insert(0, (projected @ weight[:, k - 1]).mul_(scale))
        weight_grad[:, k - 1] = (projected.t() @ table).mul_(scale)
    return table_grads, weight_grad


INCOMPLETE_BLOCK = 8  # positions with incomplete windows at a time; each has up to 222 rows


class ProjectedTables:
    """The folded rows of one layer and their gradient. The first microbatch of a step computes the
    rows, every microbatch adds to the gradient, and `finish_gradients` turns it into gradients of
    the parameters."""

    def __init__(self, tables: Tables, projection: KeyValueProjection, shape: GengramShape):
        self.projection = projection
        self.tables = [tables.weights[table.name] for table in shape.tables]
        self.rows = FoldedRows(max(shape.kmer_sizes), shape.pooling)
        self.folded: Tensor | None = None
        self.grad: Tensor | None = None
        self.versions: list[int] = []

    def key_value(self, kmers: KmerIds, local_ranges: list[TokenRange]) -> Tensor:
        """Returns keys and values of `local_ranges`, [s_local, b, 2 h] in the weight's dtype."""
        self.refresh()
        sequences = [
            _LookUp.apply(
                self.projection.weight,
                self,
                torch.stack([ids[sequence] for ids in kmers.ids]).long(),
                None if kmers.documents is None else kmers.documents[sequence],
                local_ranges,
            )
            for sequence in range(len(kmers.ids[0]))
        ]
        # The bias gets its gradient in each microbatch, as it does without projected tables.
        return self.projection.add_bias(torch.stack(sequences, dim=1))

    def finish_gradients(self) -> None:
        """Adds the gradients of the tables and the weight, after a step's last microbatch. The
        folded rows are discarded, because the parameters are about to change."""
        if self.grad is not None:
            if self.projection.sequence_parallel:
                # The other tensor-parallel ranks have the gradients of other positions.
                dist.all_reduce(self.grad, group=self.projection.tp_group)
            weight = self.projection.weight
            grads = unfold(self.rows, self.grad, self.tables, _flat(weight))
            for table, grad in zip(self.tables, grads[0]):
                _add_gradient(table, grad)
            _add_gradient(weight, grads[1].view_as(weight))
        self.folded = self.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Projects and folds the tables, unless the parameters have not changed since."""
        versions = [p._version for p in (*self.tables, self.projection.weight)]
        if self.folded is None or versions != self.versions:
            weight = _flat(self.projection.weight)
            self.folded = fold(self.rows, self.tables, weight, self._reduce)
            self.versions = versions

    def _reduce(self, partial: Tensor) -> None:
        """Sums over the tensor-parallel ranks, in place."""
        if self.projection.tp_group.size() > 1:
            dist.all_reduce(partial, group=self.projection.tp_group)


def _flat(weight: Tensor) -> Tensor:
    """Reshapes [2, h, K, d / tp] to [2 h, K, d / tp]."""
    return weight.flatten(0, 1)


@torch.no_grad()
def _add_gradient(parameter: Tensor, grad: Tensor) -> None:
    """Adds grad to the tensor that accumulates the parameter's gradient over the microbatches."""
    if hasattr(parameter, "main_grad"):
        parameter.main_grad.add_(grad)
    elif parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        parameter.grad.add_(grad)


class _LookUp(torch.autograd.Function):
    """Looks up keys and values of one sequence. The weight is an argument only so that there is a
    backward pass; its gradient, like those of the tables, is computed once per step."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        projected: ProjectedTables,
        ids: Tensor,
        documents: Tensor | None,
        ranges: list[TokenRange],
    ) -> Tensor:
        rows, folded = projected.rows, projected.folded
        assert folded is not None  # key_value has refreshed it
        ctx.projected, ctx.ids, ctx.documents, ctx.ranges = projected, ids, documents, ranges
        out = []
        for block in split_into_blocks(ranges, folded.is_cuda):
            total = _sum_complete_windows(rows, folded, ids, block)
            for positions in _incomplete(rows, ids, block).split(INCOMPLETE_BLOCK):
                index, weights = _terms(rows, ids, documents, positions, folded.dtype)
                total[positions - block.start] = F.embedding_bag(
                    index, folded, per_sample_weights=weights, mode="sum"
                )
            out.append(total.to(weight.dtype))
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None, None]:
        projected, ids = ctx.projected, ctx.ids
        rows, folded = projected.rows, projected.folded
        if projected.grad is None:
            projected.grad = torch.zeros_like(folded)
        offset = 0
        for block in split_into_blocks(ctx.ranges, folded.is_cuda):
            block_grad = grad[offset : offset + len(block)].to(folded.dtype)
            offset += len(block)
            incomplete = _incomplete(rows, ids, block)
            for positions in incomplete.split(INCOMPLETE_BLOCK):
                index, weights = _terms(rows, ids, ctx.documents, positions, folded.dtype)
                terms = weights.unsqueeze(-1) * block_grad[positions - block.start].unsqueeze(1)
                projected.grad.index_add_(0, index.flatten(), terms.flatten(0, 1))
            if len(incomplete):
                block_grad = block_grad.index_fill(0, incomplete - block.start, 0)
            _spread_complete_windows(rows, projected.grad, block_grad, ids, block)
        return None, None, None, None, None


def _sum_complete_windows(
    rows: FoldedRows, folded: Tensor, ids: Tensor, block: TokenRange
) -> Tensor:
    """Returns the sum over each position's window, [len(block), 2 h]. It is only correct for
    complete windows. ids: [K, s]."""
    span = rows.pooling.span(rows.longest)
    longest, edge = _row_indices(rows, ids, block, span)
    longest_rows = folded.index_select(0, longest).unsqueeze(1)
    total = sliding_sum(longest_rows, span).squeeze(1)[-len(block) :]
    return total if edge is None else total + folded.index_select(0, edge)


def _spread_complete_windows(
    rows: FoldedRows, folded_grad: Tensor, grad: Tensor, ids: Tensor, block: TokenRange
) -> None:
    """Applies the adjoint of `_sum_complete_windows` to grad, and adds the result to folded_grad.
    grad: [len(block), 2 h], zero where a window is not complete."""
    span = rows.pooling.span(rows.longest)
    longest, edge = _row_indices(rows, ids, block, span)
    padded = F.pad(grad, (0, 0, len(longest) - len(block), 0)).unsqueeze(1)
    folded_grad.index_add_(0, longest, sliding_sum(padded, span, ahead=True).squeeze(1))
    if edge is not None:
        folded_grad.index_add_(0, edge, grad)


def _row_indices(
    rows: FoldedRows, ids: Tensor, block: TokenRange, span: int
) -> tuple[Tensor, Tensor | None]:
    """Returns the rows of the longest k-mers that end in the block's windows, and for each position
    the row of E_{K-1} for its window's edge, or None if there is no edge. If a window is not
    complete, the rows are arbitrary."""
    longest_ids = ids[-1, max(block.start - span + 1, 0) : block.stop]
    longest = longest_ids.clamp(max=ALPHABET_SIZE**rows.longest - 1) + rows.first(rows.longest)
    if rows.edge.start == rows.edge.stop:
        return longest, None
    positions = torch.arange(block.start - span, block.stop - span, device=ids.device)
    edge = ids[-2, positions.clamp(min=0)].clamp(max=ALPHABET_SIZE ** (rows.longest - 1) - 1)
    return longest, edge + rows.edge.start


def _incomplete(rows: FoldedRows, ids: Tensor, block: TokenRange) -> Tensor:
    """Returns the positions of a block whose window starts before the sequence, or contains a token
    outside the alphabet, such as EOD."""
    length = rows.longest if rows.pooling.window is None else rows.pooling.window
    first = max(block.start - length + 1, 0)
    known = (ids[0, first : block.stop] < ALPHABET_SIZE).int().cumsum(0)
    before = F.pad(known, (length, 0))[: len(known)]
    return block.start + ((known - before)[-len(block) :] < length).nonzero().squeeze(1)


def _terms(
    rows: FoldedRows, ids: Tensor, documents: Tensor | None, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns for each position the rows to add and their weights, each [n, terms]. The mean runs
    over the valid k-mers; a k-mer that is not valid gets row 0 with weight 0."""
    index, weights = [], []
    for k in range(1, rows.longest + 1):
        span = rows.pooling.span(k)
        ends = positions.unsqueeze(1) - torch.arange(span, device=ids.device)
        in_sequence, ends = ends >= 0, ends.clamp(min=0)
        kmer_ids = ids[k - 1, ends]
        valid = in_sequence & (kmer_ids < ALPHABET_SIZE**k)
        if documents is not None:
            valid &= documents[ends] == documents[positions].unsqueeze(1)
        # The rows contain 1 / L_k, the mean over a complete window.
        share = valid.to(dtype) * span / valid.sum(1, keepdim=True).clamp(min=1)
        index.append(torch.where(valid, kmer_ids + rows.first(k), 0))
        weights.append(share)
        if k > 1:
            shorter = kmer_ids % ALPHABET_SIZE ** (k - 1) + rows.first(k - 1)
            index.append(torch.where(valid, shorter, 0))
            weights.append(-share)
    return torch.cat(index, 1), torch.cat(weights, 1)
