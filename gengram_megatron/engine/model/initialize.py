"""Initial weights that do not depend on the layout.

Each parameter is marked with its law when it is built. After that, every rank draws the full
tensor of each parameter that it holds a part of, from a generator seeded with the run's seed and
the parameter's global name, and keeps its own part. What is a part of what is read from the
sharded state dict, the same description that checkpoints are written from. So a model starts
from the same weights under any tensor, pipeline, expert or data parallelism.
"""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor, nn

LARGEST_DRAW = 2**27  # numbers at a time; 512 MiB


def whole_weight(shape, config, init_method: Callable) -> nn.Parameter:
    """A weight of which every tensor-parallel rank has all, and which it uses on its part of the
    sequence: megatron-core sums its gradient. config: megatron-core's."""
    weight = _new_weight(shape, config, init_method)
    weight.sequence_parallel = config.sequence_parallel
    return weight


def split_weight(shape, axis: int, config, init_method: Callable) -> nn.Parameter:
    """This rank's part, of a shape, of a weight that tensor-parallel ranks share along an axis."""
    weight = _new_weight(shape, config, init_method)
    set_tensor_model_parallel_attributes(weight, True, axis, 1)
    return weight


def _new_weight(shape, config, init_method: Callable) -> nn.Parameter:
    device = torch.cuda.current_device()
    weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
    init_method(weight)
    return weight


@dataclass(frozen=True)
class InitialLaw:
    """How the initial values of a parameter are drawn; exactly one of the three is given.

    std: from a normal distribution with mean 0. bound: uniformly between -bound and bound.
    constant: nothing is drawn, all values are this one.
    """

    std: float | None = None
    bound: float | None = None
    constant: float | None = None

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Values in float32, on the generator's device."""
        device = generator.device
        if self.bound is None:
            return torch.randn(shape, generator=generator, device=device) * self.std
        return torch.rand(shape, generator=generator, device=device).mul_(2).sub_(1) * self.bound


def tag_init(parameter: nn.Parameter, law: InitialLaw) -> None:
    """Note the law of a parameter's initial values."""
    parameter.initial_law = law


def init_tag(law: InitialLaw) -> Callable[[nn.Parameter], nn.Parameter]:
    """An init method for megatron-core's config that marks instead of drawing."""

    def init_method(parameter: nn.Parameter) -> nn.Parameter:
        tag_init(parameter, law)
        return parameter

    return init_method


def torch_default(fan_in: int) -> InitialLaw:
    """What torch starts the weight and bias of nn.Linear and nn.Conv1d from: uniform between
    -1 / sqrt(fan_in) and 1 / sqrt(fan_in), fan_in the number of inputs to each output."""
    return InitialLaw(bound=fan_in**-0.5)


def retag(chunk: nn.Module, config) -> None:
    """Transformer Engine makes new parameters of those that were marked when its layers were built,
    in the same memory and without the marks.

    config: megatron-core's, whose init methods mark.
    """
    for name, parameter in chunk.named_parameters():
        if hasattr(parameter, "initial_law"):
            continue
        if parameter.dim() == 1:  # of a norm
            tag_init(parameter, InitialLaw(constant=1.0))
        elif ".linear_proj." in name or ".linear_fc2." in name:
            config.output_layer_init_method(parameter)
        else:
            config.init_method(parameter)


@torch.no_grad()
def initialize(chunks: list[nn.Module], seed: int) -> None:
    """Draw the initial weights of a rank's model chunks, in place."""
    for chunk in chunks:
        for part, parameter, _ in sharded_parameters(chunk):
            if not hasattr(parameter, "initial_law"):
                raise AssertionError(f"{part.key} was built without marking its initial law")
            law = parameter.initial_law
            if law.constant is not None:
                part.data.fill_(law.constant)
            else:
                part.data.copy_(_own_part(part, law, seed))


def sharded_parameters(chunk: nn.Module) -> Iterator[tuple[ShardedTensor, nn.Parameter, int]]:
    """What a rank holds of the model: each piece of a global tensor, the parameter that it lies
    in, and its first element there. A parameter is one piece, or two where SwiGLU's gate and up
    are cut separately."""
    parameters = sorted(chunk.parameters(), key=Tensor.data_ptr)
    addresses = [p.data_ptr() for p in parameters]
    state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for value in nested_values(state):
        pieces = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        for piece in pieces:
            if isinstance(piece, ShardedTensor):
                parameter = parameters[bisect_right(addresses, piece.data.data_ptr()) - 1]
                offset = piece.data.data_ptr() - parameter.data_ptr()
                yield piece, parameter, offset // parameter.element_size()


def _own_part(part: ShardedTensor, law: InitialLaw, seed: int) -> Tensor:
    """This rank's slice of the full tensor [global shape], drawn in float32.

    Leading axes that megatron-core prepends (experts, say) are drawn one index at a time, and
    tensors too large for one rank by blocks of their rows, of which only those needed are drawn.
    """
    prepended = part.prepend_axis_num
    rows, *others = part.global_shape[prepended:]
    place = [slice(o, o + n) for o, n in zip(part.global_offset[prepended:], part.local_shape)]
    size = max(LARGEST_DRAW // math.prod(others), 1)
    first = place[0].start // size * size
    own = []
    for start in range(first, place[0].stop, size):
        stop = min(start + size, rows)
        # The first block's name is the tensor's own, so that small tensors are drawn as one.
        name = (seed, part.key, part.global_offset[:prepended], *((start,) if start else ()))
        block = law.draw((stop - start, *others), _generator(name))
        inside = slice(max(place[0].start - start, 0), min(place[0].stop, stop) - start)
        own.append(block[(inside, *place[1:])])
    return torch.cat(own) if len(own) > 1 else own[0]


def _generator(name: tuple) -> torch.Generator:
    """A generator that the name alone decides."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=7).digest()
    generator = torch.Generator(device=torch.cuda.current_device())
    return generator.manual_seed(int.from_bytes(digest, "big"))
