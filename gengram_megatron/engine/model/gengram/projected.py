"""Keys and values from tables that are projected once a step, not from the features of each token.

A microbatch then costs look-ups and sums of rows that are 2 h wide and no matrix product; the
products are done once a step, over the tables' rows, and again for their gradients. That is less
work where a rank has more tokens a step than the tables have rows a k (3,255 for k up to 6), and it
takes two more buffers [rows, 2 h] in float32 a layer: the rows and their gradient.

Look-up, mean and projection are linear, so the maps to key and value may meet the tables (19,530
rows for k up to 6) instead of the features of each token: P_k = M_k W_k^T. With L_k the places in a
window where a k-mer can end, a window without gaps yields

    sum over k of 1/L_k * (the sum of P_k over the last L_k k-mers).

The lowest digits of a k-mer's number are the shorter k-mers that end at the same token, and the
highest ones those at its start. So shorter tables fold into longer ones, K the longest:

    Q_k[i] = P_k[i] / L_k + Q_{k-1}[i mod 5^(k-1)]   all k-mers that end with this one
    E_k[i] = Q_k[i] + E_{k-1}[i div 5]               those and what the window holds before them

and the window is L_K rows of Q_K and one of E_{K-1}: 17 rows for W = 21 and k up to 6, instead of
111. One k-mer alone, shorter than K, has P_k[i] / L_k = Q_k[i] - Q_{k-1}[i mod 5^(k-1)].
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gengram_megatron.config.tables import ALPHABET_SIZE
from gengram_megatron.engine.model.gengram.ids import KmerIds
from gengram_megatron.engine.model.gengram.pooling import Pooling, blocks, sliding_sum
from gengram_megatron.engine.model.gengram.projection import KeyValueProjection
from gengram_megatron.engine.model.gengram.shape import GengramShape
from gengram_megatron.engine.model.gengram.tables import Tables
from gengram_megatron.engine.model.sequence import TokenRange


@dataclass(frozen=True)
class FoldedRows:
    """Where the rows of Q_1 .. Q_K and E_{K-1} lie in one tensor [rows, 2 h]."""

    longest: int
    pooling: Pooling

    def of(self, k: int) -> slice:
        """Q_k."""
        first = self.first(k)
        return slice(first, first + ALPHABET_SIZE**k)

    def first(self, k: int) -> int:
        """The first row of Q_k: the tables of 1 .. k - 1 come before."""
        return (ALPHABET_SIZE**k - ALPHABET_SIZE) // (ALPHABET_SIZE - 1)

    @property
    def edge(self) -> slice:
        """E_{K-1}; empty where windows hold one k-mer of each k, or K is 1."""
        first = self.first(self.longest + 1)
        wanted = self.pooling.window is not None and self.longest > 1
        return slice(first, first + wanted * ALPHABET_SIZE ** (self.longest - 1))

    @property
    def total(self) -> int:
        """Rows in all."""
        return self.edge.stop


def fold(rows: FoldedRows, tables: list[Tensor], weight: Tensor, reduce) -> Tensor:
    """tables[k - 1]: [5^k, d / tp]; weight: [2 h, K, d / tp]; reduce: adds up the ranks' parts in
    place. Returns Q_1 .. Q_K, E_{K-1}: [rows.total, 2 h], at least in float32."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide)
    folded = weight.new_empty(rows.total, len(weight))
    for k, table in enumerate(tables, start=1):
        projected = folded[rows.of(k)]
        if k > 1:
            projected.unflatten(0, (ALPHABET_SIZE, -1)).copy_(folded[rows.of(k - 1)])
        projected.addmm_(
            table.to(wide),
            weight[:, k - 1].t(),
            beta=0 if k == 1 else 1,
            alpha=1 / rows.pooling.span(k),
        )
    reduce(folded[: rows.edge.start])
    if rows.total > rows.edge.start:
        edge = folded[rows.of(1)]
        for k in range(2, rows.longest):
            longer = folded[rows.of(k)].unflatten(0, (-1, ALPHABET_SIZE))
            edge = (longer + edge.unsqueeze(1)).flatten(0, 1)
        folded[rows.edge] = edge
    return folded


def unfold(
    rows: FoldedRows, grad: Tensor, tables: list[Tensor], weight: Tensor
) -> tuple[list[Tensor], Tensor]:
    """The adjoint of `fold`: from the gradient of what it returned, summed over the ranks, to
    those of the tables and of the weight. Overwrites grad."""
    edge = grad[rows.edge]
    if len(edge):
        for k in range(rows.longest - 1, 0, -1):
            grad[rows.of(k)] += edge
            edge = edge.unflatten(0, (-1, ALPHABET_SIZE)).sum(1)
    weight = weight.to(grad.dtype)
    table_grads, weight_grad = [], torch.empty_like(weight)
    for k in range(rows.longest, 0, -1):
        projected, scale = grad[rows.of(k)], 1 / rows.pooling.span(k)
        if k > 1:
            grad[rows.of(k - 1)] += projected.unflatten(0, (ALPHABET_SIZE, -1)).sum(0)
        table = tables[k - 1].to(grad.dtype)
        table_grads.insert(0, (projected @ weight[:, k - 1]).mul_(scale))
        weight_grad[:, k - 1] = (projected.t() @ table).mul_(scale)
    return table_grads, weight_grad


SHORT_BLOCK = 8  # positions with short windows at a time: each has up to 222 rows


class ProjectedTables:
    """One layer's folded rows, made by the first microbatch of a step, and their gradient, which
    the microbatches add up and `finish_gradients` hands to the parameters."""

    def __init__(self, tables: Tables, projection: KeyValueProjection, shape: GengramShape):
        self.projection = projection
        self.tables = [tables.weights[table.name] for table in shape.tables]
        self.rows = FoldedRows(max(shape.kmer_sizes), shape.pooling)
        self.folded = self.grad = None
        self.versions: list[int] = []

    def key_value(self, kmers: KmerIds, pieces: list[TokenRange]) -> Tensor:
        """[s_local, b, 2 h]: keys and values of this rank's `pieces`, in the weights' dtype."""
        self.refresh()
        sequences = [
            _LookUp.apply(
                self.projection.weight,
                self,
                torch.stack([ids[sequence] for ids in kmers.ids]).long(),
                None if kmers.documents is None else kmers.documents[sequence],
                pieces,
            )
            for sequence in range(len(kmers.ids[0]))
        ]
        # Its gradient comes with each microbatch, as it does without projected tables.
        return self.projection.add_bias(torch.stack(sequences, dim=1))

    def finish_gradients(self) -> None:
        """After a step's last microbatch. What was folded is out of date then, too."""
        if self.grad is not None:
            if self.projection.sequence_parallel:
                dist.all_reduce(self.grad, group=self.projection.tp_group)  # of other positions
            weight = self.projection.weight
            grads = unfold(self.rows, self.grad, self.tables, _flat(weight))
            for table, grad in zip(self.tables, grads[0]):
                _add_gradient(table, grad)
            _add_gradient(weight, grads[1].view_as(weight))
        self.folded = self.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Project and fold the tables, unless they are the same as before."""
        versions = [p._version for p in (*self.tables, self.projection.weight)]
        if self.folded is None or versions != self.versions:
            weight = _flat(self.projection.weight)
            self.folded = fold(self.rows, self.tables, weight, self._add_up)
            self.versions = versions

    def _add_up(self, partial: Tensor) -> None:
        if self.projection.tp_group.size() > 1:
            dist.all_reduce(partial, group=self.projection.tp_group)


def _flat(weight: Tensor) -> Tensor:
    """[2, h, K, d / tp] as [2 h, K, d / tp]."""
    return weight.flatten(0, 1)


@torch.no_grad()
def _add_gradient(parameter: Tensor, grad: Tensor) -> None:
    """To where the gradients of all microbatches are added up."""
    if hasattr(parameter, "main_grad"):
        parameter.main_grad.add_(grad)
    elif parameter.grad is None:
        parameter.grad = grad.to(parameter.dtype)
    else:
        parameter.grad.add_(grad)


class _LookUp(torch.autograd.Function):
    """Keys and values of one sequence. The weight is an argument so that there is a backward pass;
    its gradient, like the tables', comes once a step."""

    @staticmethod
    def forward(ctx, weight, projected, ids, documents, pieces):
        rows, folded = projected.rows, projected.folded
        ctx.projected, ctx.ids, ctx.documents, ctx.pieces = projected, ids, documents, pieces
        out = []
        for piece in blocks(pieces, folded.is_cuda):
            total, short = _full_windows(rows, folded, ids, piece), _short(rows, ids, piece)
            for positions in short.split(SHORT_BLOCK):
                index, weights = _terms(rows, ids, documents, positions, folded.dtype)
                total[positions - piece.start] = F.embedding_bag(
                    index, folded, per_sample_weights=weights, mode="sum"
                )
            out.append(total.to(weight.dtype))
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        projected, ids = ctx.projected, ctx.ids
        rows, folded = projected.rows, projected.folded
        if projected.grad is None:
            projected.grad = torch.zeros_like(folded)
        offset = 0
        for piece in blocks(ctx.pieces, folded.is_cuda):
            here = grad[offset : offset + len(piece)].to(folded.dtype)
            offset += len(piece)
            short = _short(rows, ids, piece)
            for positions in short.split(SHORT_BLOCK):
                index, weights = _terms(rows, ids, ctx.documents, positions, folded.dtype)
                terms = weights.unsqueeze(-1) * here[positions - piece.start].unsqueeze(1)
                projected.grad.index_add_(0, index.flatten(), terms.flatten(0, 1))
            if len(short):
                here = here.index_fill(0, short - piece.start, 0)
            _spread_full_windows(rows, projected.grad, here, ids, piece)
        return None, None, None, None, None


def _full_windows(rows: FoldedRows, folded: Tensor, ids: Tensor, piece: TokenRange) -> Tensor:
    """[len(piece), 2 h], right where the window is full. ids: [K, s]."""
    span = rows.pooling.span(rows.longest)
    longest, edge = _addresses(rows, ids, piece, span)
    found = folded.index_select(0, longest).unsqueeze(1)
    total = sliding_sum(found, span).squeeze(1)[-len(piece) :]
    return total if edge is None else total + folded.index_select(0, edge)


def _spread_full_windows(
    rows: FoldedRows, into: Tensor, grad: Tensor, ids: Tensor, piece: TokenRange
) -> None:
    """The adjoint of `_full_windows`; grad: [len(piece), 2 h], zero where a window is short."""
    span = rows.pooling.span(rows.longest)
    longest, edge = _addresses(rows, ids, piece, span)
    ahead = F.pad(grad, (0, 0, len(longest) - len(piece), 0)).unsqueeze(1)
    into.index_add_(0, longest, sliding_sum(ahead, span, ahead=True).squeeze(1))
    if edge is not None:
        into.index_add_(0, edge, grad)


def _addresses(
    rows: FoldedRows, ids: Tensor, piece: TokenRange, span: int
) -> tuple[Tensor, Tensor | None]:
    """Rows of the longest k-mers that end in the piece's windows, and for each position that of
    the window's edge. Where a window is short, any row."""
    here = ids[-1, max(piece.start - span + 1, 0) : piece.stop]
    longest = here.clamp(max=ALPHABET_SIZE**rows.longest - 1) + rows.first(rows.longest)
    if rows.edge.start == rows.edge.stop:
        return longest, None
    places = torch.arange(piece.start - span, piece.stop - span, device=ids.device)
    edge = ids[-2, places.clamp(min=0)].clamp(max=ALPHABET_SIZE ** (rows.longest - 1) - 1)
    return longest, edge + rows.edge.start


def _short(rows: FoldedRows, ids: Tensor, piece: TokenRange) -> Tensor:
    """The positions of a piece whose window reaches before the sequence, or holds a token outside
    the alphabet, such as EOD."""
    length = rows.longest if rows.pooling.window is None else rows.pooling.window
    first = max(piece.start - length + 1, 0)
    known = (ids[0, first : piece.stop] < ALPHABET_SIZE).int().cumsum(0)
    before = F.pad(known, (length, 0))[: len(known)]
    return piece.start + ((known - before)[-len(piece) :] < length).nonzero().squeeze(1)


def _terms(
    rows: FoldedRows, ids: Tensor, documents: Tensor | None, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """For each position [n, terms]: rows, and how often each is added. The mean runs over the
    k-mers that are valid; one that is not is row 0, added 0 times."""
    index, weights = [], []
    for k in range(1, rows.longest + 1):
        span = rows.pooling.span(k)
        ends = positions.unsqueeze(1) - torch.arange(span, device=ids.device)
        inside, ends = ends >= 0, ends.clamp(min=0)
        found = ids[k - 1, ends]
        valid = inside & (found < ALPHABET_SIZE**k)
        if documents is not None:
            valid &= documents[ends] == documents[positions].unsqueeze(1)
        share = valid.to(dtype) * span / valid.sum(1, keepdim=True).clamp(min=1)
        index.append(torch.where(valid, found + rows.first(k), 0))
        weights.append(share)
        if k > 1:
            shorter = found % ALPHABET_SIZE ** (k - 1) + rows.first(k - 1)
            index.append(torch.where(valid, shorter, 0))
            weights.append(-share)
    return torch.cat(index, 1), torch.cat(weights, 1)
