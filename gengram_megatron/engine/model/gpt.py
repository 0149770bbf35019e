"""The decoder: megatron-core's GPT model, given the tokens of whole sequences."""

from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gengram_megatron.engine.model.memory import Memory
from gengram_megatron.engine.model.sequence import select_local_tokens


class GengramGPT(GPTModel):
    """One pipeline stage of the model, or one chunk of a stage.

    Every stage is given the tokens, so that a memory that reads token ids or looks to the left has
    them on every rank. What the memory computes from them is passed to the layers as
    `attention_bias` (see layer.py).
    """

    def __init__(self, memory: Memory | None, **settings: Any):
        super().__init__(**settings)
        self.model_type = ModelType.encoder_or_decoder  # read by the pipeline schedules
        self.memory = memory

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """tokens, labels: [b, s], int64, whole sequences, the same on all ranks that share them.

        Returns, for the tokens of this context-parallel rank: on the last stage the loss of each
        token [b, s_local], in nats, or without labels the logits [b, s_local, vocabulary]; on the
        other stages the hidden state [s_local, b, h], which under sequence parallelism is also
        split over the tensor-parallel ranks.
        """
        inputs = self.memory and self.memory.inputs(tokens, self.training)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return super().forward(
            input_ids=select_local_tokens(tokens),
            position_ids=select_local_tokens(positions),
            attention_mask=None,  # the layers know that it is causal
            labels=None if labels is None else select_local_tokens(labels),
            extra_block_kwargs={"attention_bias": inputs},
        )
