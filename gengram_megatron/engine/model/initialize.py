"""Initial weights that do not depend on the layout.

When a parameter is built, it is tagged with the distribution of its initial values. After that,
every rank draws the full tensor of each parameter of which it holds a part, from a generator seeded
with the run's seed and the parameter's global name, and keeps its own part. The sharded state dict,
from which checkpoints are also written, says where each part lies in the full tensor. So a model
starts from the same weights under any tensor, pipeline, expert or data parallelism.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

InitMethod = Callable[[nn.Parameter], Any]
"""Gives a new parameter its initial values, or tags it with their distribution. The result is not
used."""
LARGEST_DRAW = 2**27  # numbers drawn at a time; 512 MiB in float32


def whole_weight(
    shape: tuple[int, ...], config: TransformerConfig, init_method: InitMethod
) -> nn.Parameter:
    """Returns a weight that every tensor-parallel rank holds in full. Under sequence parallelism
    each rank applies it to its part of the sequence, and megatron-core sums its gradient over the
    ranks."""
    weight = _new_weight(shape, config, init_method)
    mark(weight, sequence_parallel=config.sequence_parallel)
    return weight


def split_weight(
    shape: tuple[int, ...], axis: int, config: TransformerConfig, init_method: InitMethod
) -> nn.Parameter:
    """Returns this rank's part of a weight that is split over the tensor-parallel ranks along
    `axis`. shape: that of the part."""
    weight = _new_weight(shape, config, init_method)
    set_tensor_model_parallel_attributes(weight, True, axis, 1)
    return weight


def mark(parameter: nn.Parameter, **attributes: object) -> None:
    """Sets attributes that megatron-core or the optimizer read from a parameter."""
    for name, value in attributes.items():
        setattr(parameter, name, value)


def _new_weight(
    shape: tuple[int, ...], config: TransformerConfig, init_method: InitMethod
) -> nn.Parameter:
    device = torch.cuda.current_device()
    weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    init_method(weight)
    return weight


@dataclass(frozen=True)
class InitDistribution:
    """The distribution of a parameter's initial values; exactly one of the three fields is given.

    std: normal with mean 0 and this standard deviation. bound: uniform between -bound and bound.
    constant: nothing is drawn, all values are this one.
    """

    std: float | None = None
    bound: float | None = None
    constant: float | None = None

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Returns values in float32, on the generator's device."""
        device = generator.device
        if self.bound is not None:
            uniform = torch.rand(shape, generator=generator, device=device)
            return uniform.mul_(2).sub_(1) * self.bound
        assert self.std is not None  # a constant is not drawn
        return torch.randn(shape, generator=generator, device=device) * self.std


def tag_init(parameter: nn.Parameter, distribution: InitDistribution) -> None:
    """Tags a parameter with the distribution of its initial values."""
    mark(parameter, init_distribution=distribution)


def init_tag(distribution: InitDistribution) -> InitMethod:
    """Returns an init method for megatron-core's config that tags the parameter with
    `distribution` and draws nothing."""

    def init_method(parameter: nn.Parameter) -> nn.Parameter:
        tag_init(parameter, distribution)
        return parameter

    return init_method


def torch_default(fan_in: int) -> InitDistribution:
    """Returns torch's default distribution for the weight and bias of nn.Linear and nn.Conv1d:
    uniform between -1 / sqrt(fan_in) and 1 / sqrt(fan_in), where fan_in is the number of inputs to
    each output."""
    return InitDistribution(bound=fan_in**-0.5)


def retag(chunk: nn.Module, config: TransformerConfig) -> None:
    """Tags the parameters of a model chunk that have no tag.

    While it builds its layers, Transformer Engine replaces tagged parameters by new ones without
    tags on the same storage.

    config: its init methods tag.
    """
    for name, parameter in chunk.named_parameters():
        if hasattr(parameter, "init_distribution"):
            continue
        if parameter.dim() == 1:  # the weight of a norm
            tag_init(parameter, InitDistribution(constant=1.0))
        elif ".linear_proj." in name or ".linear_fc2." in name:
            config.output_layer_init_method(parameter)
        else:
            config.init_method(parameter)


@torch.no_grad()
def initialize(chunks: list[MegatronModule], seed: int) -> None:
    """Draws the initial weights of a rank's model chunks, in place. Raises AssertionError for a
    parameter that has no tag, or whose sharded state does not say how it is split."""
    for chunk in chunks:
        for part, parameter, _ in sharded_parameters(chunk):
            if not hasattr(parameter, "init_distribution"):
                raise AssertionError(f"{part.key} was built without a tag for its initial values")
            _check_split(part, parameter)
            distribution = parameter.init_distribution
            if distribution.constant is not None:
                part.data.fill_(distribution.constant)
            else:
                part.data.copy_(_draw_local_part(part, distribution, seed))


def _check_split(part: ShardedTensor, parameter: nn.Parameter) -> None:
    """Raises AssertionError if tensor-parallel ranks hold different parts of a parameter, but the
    sharded state presents each part as the whole: all ranks would start with the same values, and
    the checkpoint would keep one of the parts."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return
    split = getattr(parameter, "tensor_model_parallel", False)
    # Experts and row-split tables have groups of their own (allreduce is False).
    if split and getattr(parameter, "allreduce", True) and part.global_shape == part.local_shape:
        raise AssertionError(
            f"{part.key} is split over the tensor-parallel ranks (split_weight), but its module's "
            "sharded_state_dict does not say so"
        )


def sharded_parameters(chunk: MegatronModule) -> Iterator[tuple[ShardedTensor, nn.Parameter, int]]:
    """Yields the parts of global tensors that a rank holds: the part, the parameter that contains
    it, and the index of its first element in that parameter. A parameter is one part, or two
    where SwiGLU's gate and up projections are split separately."""
    parameters = sorted(chunk.parameters(), key=Tensor.data_ptr)
    addresses = [p.data_ptr() for p in parameters]
    state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for value in nested_values(state):
        parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        for part in parts:
            if isinstance(part, ShardedTensor):
                parameter = parameters[bisect_right(addresses, part.data.data_ptr()) - 1]
                offset = part.data.data_ptr() - parameter.data_ptr()
                yield part, parameter, offset // parameter.element_size()


def _draw_local_part(part: ShardedTensor, distribution: InitDistribution, seed: int) -> Tensor:
    """Returns this rank's slice [local shape] of the full tensor [global shape], drawn in float32.

    Leading axes that megatron-core prepends (such as experts) are drawn one index at a time, and
    tensors too large for one rank in blocks of rows, of which only the needed ones are drawn.
    """
    prepended = part.prepend_axis_num
    rows, *row_shape = part.global_shape[prepended:]
    local = [slice(o, o + n) for o, n in zip(part.global_offset[prepended:], part.local_shape)]
    block_rows = max(LARGEST_DRAW // math.prod(row_shape), 1)
    first = local[0].start // block_rows * block_rows
    slices = []
    for start in range(first, local[0].stop, block_rows):
        stop = min(start + block_rows, rows)
        # The first block's name is that of the tensor, so small tensors are drawn as a whole.
        name = (seed, part.key, part.global_offset[:prepended], *((start,) if start else ()))
        block = distribution.draw((stop - start, *row_shape), _generator(name))
        needed = slice(max(local[0].start - start, 0), min(local[0].stop, stop) - start)
        slices.append(block[(needed, *local[1:])])
    return torch.cat(slices) if len(slices) > 1 else slices[0]


def _generator(name: tuple[object, ...]) -> torch.Generator:
    """Returns a generator seeded with a hash of `name`, and with nothing else."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=7).digest()
    generator = torch.Generator(device=torch.cuda.current_device())
    return generator.manual_seed(int.from_bytes(digest, "big"))
