"""The decoder: megatron-core's GPT model, which takes the tokens of whole sequences."""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gengram_megatron.engine.model.memory import Memory
from gengram_megatron.engine.model.sequence import of_this_rank


class GengramGPT(GPTModel):
    """One pipeline stage of the model, or one chunk of it.

    Every stage takes the tokens: whatever reaches left of a token, or needs tokens instead of
    hidden states, finds them on each rank. What the memory makes of them travels to the layers as
    `attention_bias` (see layer.py).
    """

    def __init__(self, memory: Memory | None, **settings: Any):
        super().__init__(**settings)
        self.model_type = ModelType.encoder_or_decoder  # which the pipeline schedules ask for
        self.memory = memory

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, labels: [b, s], int64, of whole sequences, the same on all ranks that share them.

        Returns, for this context-parallel rank's tokens: on the last stage the loss of each token
        [b, s_local], in nats, or without labels the logits [b, s_local, vocabulary]; on the other
        stages the hidden state [s_local, b, h], which is also cut among the tensor-parallel ranks
        where they share the sequence.
        """
        inputs = self.memory and self.memory.inputs(tokens, self.training)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return super().forward(
            input_ids=of_this_rank(tokens),
            position_ids=of_this_rank(positions),
            attention_mask=None,  # causal, which the layers know
            labels=None if labels is None else of_this_rank(labels),
            extra_block_kwargs={"attention_bias": inputs},
        )
