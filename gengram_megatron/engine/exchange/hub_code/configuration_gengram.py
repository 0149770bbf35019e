"""Configs of models with Gengram k-mer memory: those of transformers with a group `gengram`.

The keys of `gengram`:
    layers: the layers that have Gengram, counted from 1.
    tables: a list with k, rows, columns, hash_seed and shared of each table.
    dim: embedding columns per k-mer size.
    window: tokens in the window; null means only the k-mers that end at each token.
    token_ids: the ids of A, C, G, T, N.
    eod: the id that ends a document; null means that Gengram looks across documents.
    deduplicate, signed_sqrt, output, conv_kernel: as in the config of the training run.
    projection_bias: whether the key and value projections have a bias; false if absent.
"""

from transformers import LlamaConfig, MixtralConfig


class GengramLlamaConfig(LlamaConfig):
    """The config of a dense model with Gengram."""

    model_type = "gengram_llama"


class GengramMixtralConfig(MixtralConfig):
    """The config of a mixture of experts with Gengram."""

    model_type = "gengram_mixtral"
