"""Llama and Mixtral with Gengram k-mer memory (arXiv 2601.22203), in plain torch.

A layer with Gengram looks up embeddings of the k-mers in the window of each token, and adds the
result to its input. Windows reach to the left, so generation needs the earlier tokens, and the
earlier inputs of the convolution. They are kept in additional layers of transformers' cache, after
those of the attention.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.mixtral.modeling_mixtral import (
    MixtralDecoderLayer,
    MixtralForCausalLM,
    MixtralModel,
)
from transformers.utils import ModelOutput

from .configuration_gengram import GengramLlamaConfig, GengramMixtralConfig

COMPLEMENT = (3, 2, 1, 0, 4)  # the complements of the digits of A, C, G, T, N
PADDING = -1  # stands for masked tokens, and for tokens before the text


class Kmers:
    """The row ids of the k-mers that end at each of s tokens and at the `reach` tokens before them.

    ids: a tensor [b, reach + s] for each table. A k-mer that contains a token other than A, C, G,
    T, N, or that starts before the text, has an id one past the table's last row.
    documents: [b, reach + s], the number of each token's document; None if Gengram may look across
    documents.
    padding: [b, s], whether each of the s tokens is padding.
    """

    def __init__(self, tokens: Tensor, length: int, gengram: dict[str, Any]):
        """Computes the ids of tokens [b, n], n >= length; the last `length` are new. Masked tokens
        are PADDING."""
        self.padding = tokens[:, -length:] == PADDING
        largest = max(table["k"] for table in gengram["tables"])
        self.window, self.dilation = gengram["window"], largest
        self.reach = max(
            (self.window or largest) - 1, largest - 1, (gengram["conv_kernel"] - 1) * largest
        )
        tokens = tokens[:, -(length + self.reach) :]
        tokens = F.pad(tokens, (length + self.reach - tokens.shape[1], 0), value=PADDING)
        digits = torch.full_like(tokens, -1, dtype=torch.int64)
        for digit, token in enumerate(gengram["token_ids"]):
            digits[tokens == token] = digit
        self.ids = [self._rows(digits, table) for table in gengram["tables"]]
        eod = gengram["eod"]
        self.documents = None if eod is None else (tokens == eod).cumsum(1)

    def _rows(self, digits: Tensor, table: dict[str, Any]) -> Tensor:
        """Returns [b, reach + s], the row of the k-mer that ends at each token."""
        k, length = table["k"], digits.shape[1]
        complements = torch.tensor(COMPLEMENT, device=digits.device)
        number, other = torch.zeros_like(digits), torch.zeros_like(digits)
        valid = torch.ones_like(digits, dtype=torch.bool)
        for back in range(k):  # the last token is the least significant digit
            digit = F.pad(digits, (back, 0), value=-1)[:, :length]
            valid &= digit >= 0
            digit = digit.clamp(min=0)
            number += digit * 5**back
            other += complements[digit] * 5 ** (k - 1 - back)
        if table["shared"]:
            number = torch.minimum(number, other)
        if table["hash_seed"] is not None:
            number = mixed(number, table["hash_seed"]) % table["rows"]
        elif table["shared"]:
            number = rows_of_pairs(k, number.device)[number]
        return number.masked_fill(~valid, table["rows"])

    def at(self, x: Tensor, back: int) -> Tensor:
        """Returns [b, s], the values of x [b, reach + s] `back` tokens before each of the s."""
        return x[:, self.reach - back : x.shape[1] - back]

    def same_document(self, back: int) -> Tensor | None:
        """Returns [b, s], whether each token is in the same document as the one `back` before it.

        Returns None if Gengram may look across documents.
        """
        if self.documents is None:
            return None
        return self.at(self.documents, back) == self.at(self.documents, 0)


def mixed(number: Tensor, seed: int) -> Tensor:
    """Returns a 63-bit hash of int64 numbers, by the finalizer of SplitMix64."""
    x = number ^ seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64))
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 63) - 1)


def rows_of_pairs(k: int, device: torch.device) -> Tensor:
    """Returns [5^k], the row of two reverse complements, by the smaller of their numbers."""
    number = torch.arange(5**k, device=device)
    left, backward = number.clone(), torch.zeros_like(number)
    for _ in range(k):
        backward = backward * 5 + torch.tensor(COMPLEMENT, device=device)[left % 5]
        left = left // 5
    return (number <= backward).cumsum(0) - 1


class ShortConvolution(nn.Module):
    """SiLU of a causal depthwise convolution, whose last tap is applied to the token itself."""

    def __init__(self, hidden: int, kernel: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv1d(hidden, hidden, kernel, groups=hidden, dilation=dilation, bias=False)

    def forward(self, x: Tensor, kmers: Kmers) -> Tensor:
        """Takes x [b, earlier + s, h], the gated values of the s new tokens and of all before
        them."""
        taps = self.conv.weight[:, 0].t()
        length = kmers.ids[0].shape[1] - kmers.reach
        x = F.pad(x, (0, 0, max(length + kmers.reach - x.shape[1], 0), 0))
        out = torch.zeros_like(x[:, -length:])
        for tap, weight in enumerate(taps):
            back = (len(taps) - 1 - tap) * kmers.dilation
            source = x[:, x.shape[1] - length - back : x.shape[1] - back]
            same = kmers.same_document(back)
            out = torch.addcmul(out, source if same is None else source * same[..., None], weight)
        return F.silu(out)


class GengramMemory(nn.Module):
    """The Gengram of one layer: tables, key and value projections, gate and output."""

    def __init__(self, config: GengramLlamaConfig | GengramMixtralConfig, place: int):
        """Builds the layer whose index among those with Gengram is `place`, counted from 0."""
        super().__init__()
        gengram, hidden = config.gengram, config.hidden_size
        self.tables, self.place = gengram["tables"], place
        self.deduplicate, self.signed_sqrt = gengram["deduplicate"], gengram["signed_sqrt"]
        self.output = gengram["output"]
        sizes = sorted({table["k"] for table in self.tables})
        width = len(sizes) * gengram["dim"]
        self.embeddings = nn.ModuleList(
            nn.Embedding(table["rows"], table["columns"]) for table in self.tables
        )
        bias = gengram.get("projection_bias", False)
        self.key_proj = nn.Linear(width, hidden, bias=bias)
        self.value_proj = nn.Linear(width, hidden, bias=bias)
        self.norm_q = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        self.norm_k = nn.RMSNorm(hidden, eps=config.rms_norm_eps)
        if self.output == "convolution":
            self.short_conv = ShortConvolution(hidden, gengram["conv_kernel"], sizes[-1])
        elif self.output == "norm":
            self.norm_o = nn.RMSNorm(hidden, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, kmers: Kmers, cache: "MemoryCache | None") -> Tensor:
        """Takes hidden [b, s, h] and returns [b, s, h], to be added to it."""
        features = self._features(kmers)
        gated: Tensor = self._gate(hidden, self.key_proj(features)) * self.value_proj(features)
        if self.output == "norm":
            return F.silu(self.norm_o(gated))
        if self.output == "plain":
            return gated
        # Padding must not reach the convolution, whatever its hidden state is.
        gated = gated.masked_fill(kmers.padding[..., None], 0)
        convolved: Tensor = self.short_conv(remember(cache, gated, self.place), kmers)
        return gated + convolved

    def _features(self, kmers: Kmers) -> Tensor:
        """Returns [b, s, number of ks * d], one k after the other, the heads of a k interleaved."""
        means: dict[int, list[Tensor]] = {}
        for table, embedding, ids in zip(self.tables, self.embeddings, kmers.ids):
            # For type checkers, the attributes of a module in a list may also be modules.
            mean = self._mean(cast(Tensor, embedding.weight), ids, table, kmers)
            means.setdefault(table["k"], []).append(mean)
        return torch.cat([torch.stack(heads, dim=-1).flatten(-2) for heads in means.values()], -1)

    def _mean(self, rows: Tensor, ids: Tensor, table: dict[str, Any], kmers: Kmers) -> Tensor:
        """Returns [b, s, d], the mean over the valid k-mers entirely inside each token's window."""
        span = 1 if kmers.window is None else kmers.window - table["k"] + 1
        total = ids.new_zeros((), dtype=torch.float32)
        count = ids.new_zeros((), dtype=torch.int32)
        for back in range(span):
            here = kmers.at(ids, back)
            counts = here < table["rows"]
            same = kmers.same_document(back)
            if same is not None:
                counts = counts & same
            if self.deduplicate:
                for later in range(back):
                    counts = counts & (here != kmers.at(ids, later))
            found = F.embedding(here.clamp(max=table["rows"] - 1), rows).float()
            total = total + found * counts[..., None]
            count = count + counts.int()
        return (total / count.clamp(min=1)[..., None]).to(rows.dtype)

    def _gate(self, hidden: Tensor, key: Tensor) -> Tensor:
        """Returns the gate [b, s, 1] from the hidden state and the key, both [b, s, h]."""
        product = self.norm_q(hidden) * self.norm_k(key)
        agreement = product.sum(-1, keepdim=True, dtype=torch.float32) / hidden.shape[-1] ** 0.5
        if self.signed_sqrt:
            agreement = agreement.sign() * agreement.abs().clamp_min(1e-6).sqrt()
        return torch.sigmoid(agreement).to(hidden.dtype)


class MemoryCache:
    """The additional layers of a model's cache: one for the tokens, then one for each layer with
    Gengram.

    layers: the number of the model's layers, whose cache comes first.
    """

    def __init__(self, cache: DynamicCache, layers: int):
        self.cache, self.first = cache, layers

    def append(self, x: Tensor, place: int) -> Tensor:
        """Appends x [b, s, n] to a cache layer, and returns all that is in it, [b, earlier + s, n].

        place: the index of the layer among the additional ones.
        """
        layers, place = self.cache.layers, self.first + place
        while len(layers) <= place:
            layers.append(DynamicLayer())
        x = x.unsqueeze(1)
        everything: Tensor = layers[place].update(x, x[..., :0])[0]
        return everything.squeeze(1)


def remember(cache: MemoryCache | None, x: Tensor, place: int) -> Tensor:
    """Returns all values of the Gengram layer of index `place` so far, the last of which are x."""
    return x if cache is None else cache.append(x, place + 1)


class LayerWithMemory(nn.Module):
    """Mixin that runs Gengram before a decoder layer."""

    def __init__(self, config: GengramLlamaConfig | GengramMixtralConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        layers = config.gengram["layers"]
        self.gengram: GengramMemory | None = None
        if layer_idx + 1 in layers:
            self.gengram = GengramMemory(config, sorted(layers).index(layer_idx + 1))

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        kmers: Kmers | None = None,
        memory_cache: MemoryCache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Adds Gengram's output to hidden_states [b, s, h] before the layer's own computation."""
        if self.gengram is not None:
            hidden_states = hidden_states + self.gengram(hidden_states, kmers, memory_cache)
        output: Tensor = super().forward(hidden_states, *args, **kwargs)
        return output


class ModelWithMemory(nn.Module):
    """Mixin that computes the k-mers of the tokens and passes them to the decoder's layers."""

    # Of the model that this is mixed into.
    config: GengramLlamaConfig | GengramMixtralConfig
    gradient_checkpointing: bool
    post_init: Callable[[], None]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Computes the k-mers, keeps what later tokens need in the cache, and runs the layers.

        Raises ValueError without token ids, or for a cache that is not a DynamicCache.
        """
        if input_ids is None:
            raise ValueError("memory is looked up by token ids: give input_ids, not inputs_embeds")
        # Layers that are recomputed for gradient checkpointing would append to a cache twice.
        recomputes = self.training and self.gradient_checkpointing
        if use_cache is None:
            # Training reads no cache, so there is none unless requested: other libraries, such as
            # FSDP, recompute layers without telling the model.
            use_cache = self.config.use_cache and not (self.training and torch.is_grad_enabled())
        if use_cache and past_key_values is None and not recomputes:
            past_key_values = DynamicCache(config=self.config)
        tokens = visible(input_ids, attention_mask)
        cache, seen = None, tokens
        if past_key_values is not None and not recomputes:
            if not isinstance(past_key_values, DynamicCache):
                raise ValueError("memory keeps what came before in a DynamicCache, and in no other")
            cache = MemoryCache(past_key_values, self.config.num_hidden_layers)
            seen = cache.append(tokens.unsqueeze(-1), 0).squeeze(-1)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            kmers=Kmers(seen, input_ids.shape[1], self.config.gengram),
            memory_cache=cache,
            **kwargs,
        )


def visible(input_ids: Tensor, attention_mask: Any) -> Tensor:
    """Returns input_ids [b, s] with PADDING for masked tokens.

    attention_mask: [b, earlier + s], 0 or False for padding. A mask of any other shape says which
    tokens attend to which, not which are padding, and is ignored here.
    """
    if attention_mask is None or getattr(attention_mask, "ndim", 0) != 2:
        return input_ids
    return input_ids.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, PADDING)


class GengramLlamaLayer(LayerWithMemory, LlamaDecoderLayer):
    """A dense layer that may have Gengram."""


class GengramLlamaModel(ModelWithMemory, LlamaModel):
    """A dense model with Gengram, without the language modelling head."""

    config_class = GengramLlamaConfig
    _no_split_modules = ("GengramLlamaLayer",)

    def __init__(self, config: GengramLlamaConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            GengramLlamaLayer(config, n) for n in range(config.num_hidden_layers)
        )
        self.post_init()


class GengramLlamaForCausalLM(LlamaForCausalLM):
    """A dense model with Gengram and a language modelling head."""

    config_class = GengramLlamaConfig
    _no_split_modules = ("GengramLlamaLayer",)

    def __init__(self, config: GengramLlamaConfig):
        super().__init__(config)
        self.model = GengramLlamaModel(config)
        self.post_init()


class GengramMixtralLayer(LayerWithMemory, MixtralDecoderLayer):
    """A mixture-of-experts layer that may have Gengram."""


class GengramMixtralModel(ModelWithMemory, MixtralModel):
    """A mixture of experts with Gengram, without the language modelling head."""

    config_class = GengramMixtralConfig
    _no_split_modules = ("GengramMixtralLayer",)

    def __init__(self, config: GengramMixtralConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(
            GengramMixtralLayer(config, n) for n in range(config.num_hidden_layers)
        )
        self.post_init()


class GengramMixtralForCausalLM(MixtralForCausalLM):
    """A mixture of experts with Gengram and a language modelling head."""

    config_class = GengramMixtralConfig
    _no_split_modules = ("GengramMixtralLayer",)

    def __init__(self, config: GengramMixtralConfig):
        super().__init__(config)
        self.model = GengramMixtralModel(config)
        self.post_init()
