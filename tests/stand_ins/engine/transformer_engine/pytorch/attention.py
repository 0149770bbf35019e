"""Attention."""

import torch.nn.functional as F

from transformer_engine.pytorch.base import TransformerEngineBaseModule, compute_alone, ranks


class DotProductAttention(TransformerEngineBaseModule):
    """softmax(q k^T) v, causal."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        window_size=None,
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
        softmax_type="vanilla",
        return_max_logit=False,
    ):
        super().__init__()
        self.ranks = ranks(tp_group, tp_size) * ranks(cp_group)
        width = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.softmax_scale = softmax_scale or width**-0.5
        self.register_load_state_dict_post_hook(_without_notes)

    def forward(
        self,
        query_layer,
        key_layer,
        value_layer,
        attention_mask=None,
        qkv_format=None,
        cu_seqlens_q=None,
        cu_seqlens_kv=None,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        attn_mask_type=None,
        window_size=None,
        checkpoint_core_attention=False,
        core_attention_bias_type="no_bias",
        core_attention_bias=None,
        alibi_slopes=None,
        fast_zero_fill=True,
        inference_params=None,
        pad_between_seqs=None,
        fp8_output=False,
        num_splits=1,
    ):
        """[s, b, heads, d] and [s, b, groups, d]; returns [s, b, heads * d]."""
        if attn_mask_type != "causal" or core_attention_bias is not None:
            raise NotImplementedError("the stand-in knows causal attention only")
        compute_alone(self.ranks)
        self.init_fp8_metadata(num_gemms=3)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)


def _without_notes(module, incompatible) -> None:
    """Checkpoints need not have the notes of attention."""
    for key in [*incompatible.missing_keys]:
        if "core_attention._extra_state" in key:
            incompatible.missing_keys.remove(key)
