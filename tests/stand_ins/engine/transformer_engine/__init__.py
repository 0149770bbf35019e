"""A stand-in of Transformer Engine for a machine without a GPU. It is not Transformer Engine.

The names and arguments of modules and functions are those of its public documentation (2.9 to
2.11, the versions that megatron-core 0.16.1 asks for), so that a call with an argument that does
not exist there fails here as well. What a module computes is the plain formula in torch, on one
process (on several it can only be built); fp8 rounds nothing and only checks the sides of matrices.
Habits of the real modules are kept that callers may trip over: parameters are wrapped anew after
their init method was called, a gradient that was added to its sum leaves only room behind and
replaces the sum in the first microbatch, and the state of a module has notes (`_extra_state`).
Optimizers and fused functions are left out, as a version may lack them, too.
"""

from transformer_engine import common as common
from transformer_engine import pytorch as pytorch

__version__ = "2.10.0"
