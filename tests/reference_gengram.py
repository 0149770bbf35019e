"""Gengram memory as the paper's Algorithm 1 has it, position by position, in float64.

Slow and obviously right: what the tests compare the package with. Nothing here comes from the
package. Weights are plain tensors, and gradients flow to all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-5


@dataclass(frozen=True)
class Options:
    """The published code's choices, and those that the paper writes instead."""

    deduplicate: bool = False
    signed_sqrt: bool = True
    output: str = "convolution"
    eod: int | None = None  # where given, nothing crosses this token


PUBLISHED = Options()


def kmers_in_window(length: int, position: int, k: int, window: int | None) -> list[range]:
    """The places of each k-mer that lies wholly inside the window of a position and wholly inside
    the sequence. Without a window: the one k-mer that ends at the position.

    The position that predicts token t holds token t - 1, and its window is {t-W, ..., t-1}.
    """
    t = position + 1
    first = t - (k if window is None else window)
    found = []
    for end in range(t):
        places = range(end - k + 1, end + 1)
        if places[0] >= first and places[0] >= 0 and places[-1] < length:
            found.append(places)
    return found


def row_of(kmer: list[int], alphabet: list[int]) -> int | None:
    """The k-mer's number in base 5, its last token the lowest digit; None: it is not valid,
    because one of its tokens is not A, C, G, T or N (the order of `alphabet`)."""
    row = 0
    for token in kmer:
        if token not in alphabet:
            return None
        row = row * 5 + alphabet.index(token)
    return row


def crosses(tokens: list[int], first: int, last: int, eod: int | None) -> bool:
    """Whether a document ends after `first` and not after `last`: an EOD at first + 1 .. last."""
    return eod is not None and eod in tokens[first + 1 : last + 1]


def rows_in_window(
    tokens: list[int],
    position: int,
    k: int,
    window: int | None,
    alphabet: list[int],
    options: Options = PUBLISHED,
) -> list[int]:
    """Rows of table k that the window of a position looks up, one for each valid k-mer."""
    rows = []
    for places in kmers_in_window(len(tokens), position, k, window):
        row = row_of([tokens[place] for place in places], alphabet)
        if row is None or crosses(tokens, places[0], position, options.eod):
            continue
        if not (options.deduplicate and row in rows):
            rows.append(row)
    return rows


def pooled(
    tokens: list[int],
    position: int,
    tables: dict[int, Tensor],
    window: int | None,
    alphabet: list[int],
    options: Options,
) -> Tensor:
    """m_t: for each k the mean of the looked-up rows, zero where there are none, concatenated."""
    means = []
    for k, table in tables.items():
        rows = rows_in_window(tokens, position, k, window, alphabet, options)
        means.append(table[rows].sum(0) / max(len(rows), 1))
    return torch.cat(means)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + EPSILON) * weight


def gate(x: Tensor, z: Tensor, norm_hidden: Tensor, norm_key: Tensor, signed_sqrt: bool) -> Tensor:
    """sigmoid(signed square root of <RMSNorm(x), RMSNorm(z)> / sqrt(h)), a scalar."""
    g = (rms_norm(x, norm_hidden) * rms_norm(z, norm_key)).sum() / len(x) ** 0.5
    if not signed_sqrt:
        return 1 / (1 + torch.exp(-g))
    size = max(g.abs(), torch.tensor(1e-6, dtype=g.dtype))
    return 1 / (1 + torch.exp(-torch.sign(g) * torch.sqrt(size)))


def convolution(
    o: list[Tensor],
    position: int,
    taps: Tensor,
    dilation: int,
    tokens: list[int],
    eod: int | None,
) -> Tensor:
    """Depthwise, causal: the last tap meets the position itself, each tap before it `dilation`
    positions earlier; nothing lies before the sequence or the document. taps: [kernel, h]."""
    total = torch.zeros_like(o[0])
    for tap in range(len(taps)):
        place = position - (len(taps) - 1 - tap) * dilation
        if place >= 0 and not crosses(tokens, place, position, eod):
            total = total + taps[tap] * o[place]
    return total


def gengram(
    hidden: Tensor,
    tokens: list[list[int]],
    tables: dict[int, Tensor],
    key: Tensor,
    value: Tensor,
    norm_hidden: Tensor,
    norm_key: Tensor,
    taps: Tensor,
    alphabet: list[int],
    window: int | None,
    options: Options = PUBLISHED,
    key_bias: Tensor | float = 0.0,
    value_bias: Tensor | float = 0.0,
) -> Tensor:
    """What a layer adds to its hidden state.

    hidden: [s, b, h]; tokens: b rows of s ids; tables[k]: [5^k, d], in the order of k;
    key, value: [h, number of k * d]; taps: of the convolution, or [h], the weight of the norm of
    output "norm"; key_bias, value_bias: [h], the terms b_k and b_v of equation 11; the rest as
    above. Returns [s, b, h].
    """
    dilation = max(tables)
    columns = []
    for b, row in enumerate(tokens):
        o = []
        for position in range(len(row)):
            m = pooled(row, position, tables, window, alphabet, options)
            z, u = key @ m + key_bias, value @ m + value_bias
            g = gate(hidden[position, b], z, norm_hidden, norm_key, options.signed_sqrt)
            o.append(g * u)
        out = []
        for position in range(len(row)):
            if options.output == "convolution":
                c = convolution(o, position, taps, dilation, row, options.eod)
                out.append(o[position] + c / (1 + torch.exp(-c)))
            elif options.output == "norm":
                n = rms_norm(o[position], taps)
                out.append(n / (1 + torch.exp(-n)))
            else:
                out.append(o[position])
        columns.append(torch.stack(out))
    return torch.stack(columns, dim=1)
