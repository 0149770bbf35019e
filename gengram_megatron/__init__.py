"""gengram_megatron: pretraining of genomic language models with Gengram memory."""

__version__ = "0.1.0"
