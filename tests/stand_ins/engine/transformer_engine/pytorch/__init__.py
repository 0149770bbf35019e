"""The modules and functions that megatron-core uses."""

from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch import ops as ops
from transformer_engine.pytorch.attention import DotProductAttention as DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast as fp8_autocast
from transformer_engine.pytorch.fp8 import fp8_model_init as fp8_model_init
from transformer_engine.pytorch.linear import GroupedLinear as GroupedLinear
from transformer_engine.pytorch.linear import LayerNormLinear as LayerNormLinear
from transformer_engine.pytorch.linear import Linear as Linear
from transformer_engine.pytorch.norm import LayerNorm as LayerNorm
from transformer_engine.pytorch.norm import RMSNorm as RMSNorm
from transformer_engine.pytorch.padding import Fp8Padding as Fp8Padding
from transformer_engine.pytorch.padding import Fp8Unpadding as Fp8Unpadding
