"""Estimates the bytes of activations that are kept for the backward pass, layer by layer.

They are counted from what each operation saves on a GPU, with flash attention and the fused kernels
for norms and SwiGLU, assuming that tokens are spread evenly over the experts.
"""

from dataclasses import dataclass

from gengram_megatron.config import weights
from gengram_megatron.plan.stages import ShardedModel

BYTES = {"bf16": 2, "fp32": 4}
EXPERTS_AT_WORK = {"bf16": (5, 10), "fp32": (1, 5)}
"""Measured number of tensors of an expert's width that its backward pass holds at once, without and
with recomputation of the activation. In bf16 half of them are float32."""
STATISTICS = 4  # bytes per statistic that norms and softmaxes keep in float32


@dataclass(frozen=True)
class Tokens:
    """Tokens of one microbatch on one rank."""

    whole: int
    """Tokens of the whole sequences, whose ids all ranks have."""
    part: int
    """Tokens of this rank's context-parallel part, as they are inside tensor-parallel regions."""
    shard: int
    """Tokens outside of tensor-parallel regions: fewer than `part` with sequence parallelism."""
    routed: int
    """Rows that the experts of this rank get."""

    @classmethod
    def of(cls, sharded: ShardedModel) -> "Tokens":
        """Returns the tokens of a config in its layout."""
        layout, config = sharded.layout, sharded.config
        whole = config.train.micro_batch_size * config.model.seq_length
        part = whole // layout.context
        shard = part // layout.tensor if layout.sequence else part
        _, topk = weights.experts(config.model)
        # All tensor-parallel ranks of an expert get its tokens.
        return cls(whole, part, shard, shard * topk * layout.expert_tensor)


class Activations:
    """Bytes of one microbatch's activations on one rank."""

    def __init__(self, sharded: ShardedModel):
        self.sharded, self.model = sharded, sharded.config.model
        self.tokens = Tokens.of(sharded)
        self.size = BYTES[sharded.config.train.dtype]
        self.recompute = sharded.config.train.recompute
        self.tensor = sharded.layout.tensor
        self.stream = self.tokens.shard * self.model.hidden_size * self.size
        """Bytes of the hidden state."""

    def kept(self, layer: int) -> int:
        """Returns the bytes kept from a layer's forward pass to its backward pass."""
        return self.stream if self.recompute == "full" else self.of_layer(layer)

    def of_layer(self, layer: int) -> int:
        """Returns the bytes that a layer's backward pass reads: its input and everything inside."""
        selective = self.recompute == "selective"
        normed = 0 if selective else self.stream
        norm = self.stream + STATISTICS * self.tokens.shard
        attention = norm + normed + self._attention()
        feed_forward = norm + normed + (self._dense() if self.sharded.is_dense else self._experts())
        gengram = self._gengram() if self.sharded.has_gengram(layer) else 0
        return attention + feed_forward + gengram

    def _attention(self) -> int:
        """Returns the bytes of projections, rotated queries and keys, the result, and the softmax's
        statistics."""
        model, heads = self.model, self.model.num_attention_heads
        query_width, value_width = weights.head_widths(model)
        statistics = heads * STATISTICS
        if model.attention == "mla":
            mla = model.mla
            inside = heads * 2 * (query_width + value_width)
            rotated = mla.qk_pos_emb_head_dim
            compressed = 2 * (mla.kv_lora_rank + (mla.q_lora_rank or 0)) + rotated
        else:
            # Query, key and value are projected into one tensor, and the values are a view of it.
            groups = weights.key_value_heads(model)
            inside = (3 * heads + 3 * groups) * query_width
            rotated, compressed = query_width, 0
        rotary = 4 * rotated  # sines and cosines, for queries and for keys
        kept = self.tokens.part * (
            (inside // self.tensor + rotary) * self.size + statistics // self.tensor
        )
        kept += self.tokens.shard * compressed * self.size
        return kept + (self._gathered_keys() if self.sharded.layout.context > 1 else 0)

    def _gathered_keys(self) -> int:
        """Returns the bytes that context parallelism adds: keys and values of what each of the
        rank's two chunks attends to, copied for every query head, and a second copy of the result,
        made when the two chunks are concatenated."""
        heads, context = self.model.num_attention_heads, self.sharded.layout.context
        width, value_width = weights.head_widths(self.model)
        if weights.key_value_heads(self.model) == heads:
            attended = self.tokens.whole
        else:
            attended = self.tokens.whole * (2 * context + 1) // (2 * context)
        per_head = attended * (width + value_width) + self.tokens.part * value_width
        return per_head * heads // self.tensor * self.size

    def _dense(self) -> int:
        """Returns the bytes of gate and up, and of their product; 0 if the layer is recomputed."""
        if self.recompute == "selective":
            return 0
        width = 3 * self.model.ffn_hidden_size // self.tensor
        return self.tokens.part * width * self.size

    def _experts(self) -> int:
        """Returns the bytes of the routing, of the rows that were sent to this rank, and of the
        inside of the experts: gate and up and, unless recomputed, three results of the activation.
        """
        model = self.model
        experts, topk = weights.experts(model)
        routing = 18 * experts + 24 * topk + 28
        widths = 2 if self.recompute == "selective" else 5
        inside = (
            model.hidden_size + widths * model.ffn_hidden_size // self.sharded.feed_forward_ranks
        )
        return self.tokens.shard * routing + self.tokens.routed * inside * self.size

    def _gengram(self) -> int:
        """Returns the bytes of the Gengram layer's input, key and value, and of the rows that were
        fetched from other ranks."""
        fetched = 0
        for placement in self.sharded.layout.placements:
            if placement.rows_over is not None:
                rows = min(placement.table.rows, self.tokens.part)
                fetched += rows * placement.table.columns // self.tensor
        return 3 * self.stream + fetched * self.size

    def ids(self) -> int:
        """Returns the bytes of a microbatch's k-mer ids, which all its Gengram layers share."""
        return len(self.sharded.layout.placements) * self.tokens.whole * 4

    def last(self) -> int:
        """Returns the bytes of the last norm's input and output."""
        return 2 * self.stream + STATISTICS * self.tokens.shard

    def logits(self) -> int:
        """Returns the bytes of the logits and of their softmax in float32, which becomes their
        gradient."""
        vocabulary = self.model.vocab_size // self.tensor
        return self.tokens.part * vocabulary * (self.size + 2 * 4)

    def at_work(self) -> int:
        """Returns the bytes that the backward pass of one layer needs besides what was kept."""
        recomputes = self.recompute == "selective"
        if self.sharded.is_dense:
            rows, widths = self.tokens.part, 6 if recomputes else 3
        else:
            rows = self.tokens.routed
            widths = EXPERTS_AT_WORK[self.sharded.config.train.dtype][recomputes]
        width = widths * self.model.ffn_hidden_size // self.sharded.feed_forward_ranks
        return rows * width * self.size + 4 * self.stream
