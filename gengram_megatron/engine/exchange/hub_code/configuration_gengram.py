"""Configs of models with Gengram k-mer memory: transformers' own, and a group `gengram`.

gengram: layers (with memory, from 1), tables (k, rows, columns, hash_seed, shared of each), dim,
window (null: only the k-mer that ends at each token), token_ids (of A C G T N), eod (null: memory
looks across documents), deduplicate, signed_sqrt, output, conv_kernel, projection_bias (of key and
value; false where it is not there).
"""

from transformers import LlamaConfig, MixtralConfig


class GengramLlamaConfig(LlamaConfig):
    """Dense."""

    model_type = "gengram_llama"


class GengramMixtralConfig(MixtralConfig):
    """Mixture of experts."""

    model_type = "gengram_mixtral"
