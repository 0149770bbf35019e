"""Sums over the window of each position, and their adjoint.

The window of position t holds the k-mers that end at the last `span` positions, t included. A sum
over it is built from sums over 1, 2, 4, ... positions, about 2 log2(span) additions of whole
tensors, so its rounding does not grow with the length of the sequence, as that of a difference of
prefix sums does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
