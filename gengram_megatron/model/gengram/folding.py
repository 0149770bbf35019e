"""Tables projected once a step, and folded so that a window needs few of their rows.

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
from torch import Tensor

from gengram_megatron.config.tables import ALPHABET_SIZE
from gengram_megatron.model.gengram.pooling import Pooling


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
