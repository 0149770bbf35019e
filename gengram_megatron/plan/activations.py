"""Bytes of activations that are kept for the backward pass, layer by layer.

Counted from what each operation saves on a GPU, with flash attention and the fused kernels for
norms and SwiGLU. Tokens are taken to be spread evenly over the experts.
"""

from dataclasses import dataclass

from gengram_megatron.config import weights
from gengram_megatron.plan.stages import ShardedModel

BYTES = {"bf16": 2, "fp32": 4}
EXPERTS_AT_WORK = {"bf16": (5, 10), "fp32": (1, 5)}
"""Widths of an expert that its backward pass holds at once, as measured: without and with
recomputation of the activation. In bf16 half of them are float32."""
STATISTICS = 4  # bytes of a number that norms and softmaxes keep in float32


@dataclass(frozen=True)
class Tokens:
    """Tokens of one microbatch on one rank."""

    whole: int
    """Of the whole sequences: all ranks have all ids."""
    part: int
    """Between the collectives of tensor parallelism: the context-parallel part."""
    shard: int
    """Outside of them: less under sequence parallelism."""
    routed: int
    """Rows that the experts of this rank get."""

    @classmethod
    def of(cls, split: ShardedModel) -> "Tokens":
        """For a config in its layout."""
        layout, config = split.layout, split.config
        whole = config.train.micro_batch_size * config.model.seq_length
        part = whole // layout.context
        shard = part // layout.tensor if layout.sequence else part
        _, chosen = weights.experts(config.model)
        # Tensor-parallel ranks inside an expert all get its tokens.
        return cls(whole, part, shard, shard * chosen * layout.expert_tensor)


class Activations:
    """Of one microbatch."""

    def __init__(self, split: ShardedModel):
        self.split, self.model = split, split.config.model
        self.tokens = Tokens.of(split)
        self.size = BYTES[split.config.train.dtype]
        self.recompute = split.config.train.recompute
        self.tensor = split.layout.tensor
        self.stream = self.tokens.shard * self.model.hidden_size * self.size
        """Bytes of the hidden state."""

    def kept(self, layer: int) -> int:
        """From a layer's forward pass to its backward pass."""
        return self.stream if self.recompute == "full" else self.of_layer(layer)

    def of_layer(self, layer: int) -> int:
        """What a layer's own backward pass reads: its input and everything inside."""
        selective = self.recompute == "selective"
        normed = 0 if selective else self.stream
        norm = self.stream + STATISTICS * self.tokens.shard
        attention = norm + normed + self._attention()
        feed_forward = norm + normed + (self._dense() if self.split.is_dense else self._experts())
        memory = self._gengram() if self.split.has_gengram(layer) else 0
        return attention + feed_forward + memory

    def _attention(self) -> int:
        """Projections, rotated queries and keys, the result, and the softmax's statistics."""
        model, heads = self.model, self.model.num_attention_heads
        query_width, value_width = weights.head_widths(model)
        statistics = heads * STATISTICS
        if model.attention == "mla":
            mla = model.mla
            inside = heads * 2 * (query_width + value_width)
            rotated = mla.qk_pos_emb_head_dim
            compressed = 2 * (mla.kv_lora_rank + (mla.q_lora_rank or 0)) + rotated
        else:
            # All three projected in one tensor, of which the values are a view.
            groups = weights.key_value_heads(model)
            inside = (3 * heads + 3 * groups) * query_width
            rotated, compressed = query_width, 0
        rotary = 4 * rotated  # sines and cosines, for queries and for keys
        kept = self.tokens.part * (
            (inside // self.tensor + rotary) * self.size + statistics // self.tensor
        )
        kept += self.tokens.shard * compressed * self.size
        return kept + (self._gathered_keys() if self.split.layout.context > 1 else 0)

    def _gathered_keys(self) -> int:
        """Under context parallelism: keys and values of what each of the rank's two chunks sees, a
        copy for every query head, and the result once more, as both chunks are put together."""
        heads, context = self.model.num_attention_heads, self.split.layout.context
        width, value_width = weights.head_widths(self.model)
        if weights.key_value_heads(self.model) == heads:
            seen = self.tokens.whole
        else:
            seen = self.tokens.whole * (2 * context + 1) // (2 * context)
        own = seen * (width + value_width) + self.tokens.part * value_width
        return own * heads // self.tensor * self.size

    def _dense(self) -> int:
        """Gate and up together, and their product; nothing where the layer is recomputed."""
        if self.recompute == "selective":
            return 0
        width = 3 * self.model.ffn_hidden_size // self.tensor
        return self.tokens.part * width * self.size

    def _experts(self) -> int:
        """The routing, the rows that were sent here, and the inside of the experts: gate and up
        together and, where they are not recomputed, three results of the activation."""
        model = self.model
        routing = 18 * model.num_experts + 24 * model.moe_router_topk + 28
        widths = 2 if self.recompute == "selective" else 5
        inside = model.hidden_size + widths * model.ffn_hidden_size // self.split.feed_forward_ranks
        return self.tokens.shard * routing + self.tokens.routed * inside * self.size

    def _gengram(self) -> int:
        """The layer's own input, key and value, and rows that were fetched from other ranks."""
        fetched = 0
        for place in self.split.tables:
            if place.over is not None:
                rows = min(place.table.rows, self.tokens.part)
                fetched += rows * place.table.columns // self.tensor
        return 3 * self.stream + fetched * self.size

    def ids(self) -> int:
        """The k-mers of a microbatch, which all its layers share."""
        return len(self.split.tables) * self.tokens.whole * 4

    def last(self) -> int:
        """The last norm's input and output."""
        return 2 * self.stream + STATISTICS * self.tokens.shard

    def logits(self) -> int:
        """Logits and, in float32, the softmax that becomes their gradient."""
        vocabulary = self.model.vocab_size // self.tensor
        return self.tokens.part * vocabulary * (self.size + 2 * 4)

    def at_work(self) -> int:
        """What the backward pass of one layer needs besides what was kept."""
        again = self.recompute == "selective"
        if self.split.is_dense:
            rows, widths = self.tokens.part, 6 if again else 3
        else:
            rows = self.tokens.routed
            widths = EXPERTS_AT_WORK[self.split.config.train.dtype][again]
        width = widths * self.model.ffn_hidden_size // self.split.feed_forward_ranks
        return rows * width * self.size + 4 * self.stream
