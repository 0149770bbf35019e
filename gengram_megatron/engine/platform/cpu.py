"""megatron-core on a machine without CUDA.

megatron-core (0.16.1) assumes that there is a GPU: it asks `torch.cuda` for the current device, for
streams and for random states, creates tensors with `device="cuda"` and compares tensor types with
`torch.cuda.FloatTensor`. `stand_in_for_cuda` replaces all of these for the CPU. `adapt_megatron`
replaces the few functions of megatron-core itself that need a GPU's random state, copy from device
to host, or use collectives that gloo lacks. Nothing in this module runs where CUDA is available.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

CPU = torch.device("cpu")
_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint",
    "zeros_like", "ones_like", "empty_like", "full_like", "rand_like",
)  # fmt: skip


class _Stream:
    """A stream on the CPU. Work is done when a call returns, so all streams are equal and idle."""

    def __init__(self, *_: Any, **__: Any): ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    __hash__ = object.__hash__

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: "_Stream") -> None: ...

    def wait_event(self, event: "_Event") -> None: ...

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any): ...

    def record(self, stream: _Stream | None = None) -> None: ...

    def wait(self, stream: _Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def stand_in_for_cuda() -> None:
    """Replaces the names of `torch.cuda` that megatron-core uses by versions for the CPU.

    Every name gets a separate function, because torch's compiler, which optimizers load, raises if
    it finds one object under two names.
    """
    cuda = torch.cuda
    replacements = {
        "current_device": lambda: CPU,
        "device_count": lambda: 1,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda *_: _Stream(),
        "default_stream": lambda *_: _Stream(),
        "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": lambda state, *_, **__: torch.set_rng_state(state),
    }
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        replacements[name] = lambda *_, **__: None
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        replacements[name] = lambda *_, **__: 0
    for name, replacement in replacements.items():
        setattr(cuda, name, replacement)
    cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.nvtx.range_push = lambda *_: None
    cuda.nvtx.range_pop = lambda *_: None
    _redirect_tensors()


def _redirect_tensors() -> None:
    """Makes torch create tensors for "cuda" on the CPU, and name tensor types as on a GPU."""

    def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
            if device is not None:
                kwargs["device"] = CPU if str(device).startswith("cuda") else device
            return factory(*args, **kwargs)

        return create

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))
    tensor_class: Any = Tensor
    tensor_class.cuda = lambda self, *_, **__: self

    type_of = Tensor.type

    def cuda_type(self: Tensor, dtype: Any = None, **kwargs: Any) -> str | Tensor:
        """Returns the name of the CUDA type, by which DistributedOptimizer groups parameters."""
        if dtype is None and self.device == CPU:
            return type_of(self).replace("torch.", "torch.cuda.", 1)
        converted: str | Tensor = type_of(self, dtype, **kwargs)
        return converted

    tensor_class.type = cuda_type


def adapt_megatron() -> None:
    """Replaces the functions of megatron-core that only work on a GPU."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # The tracker warns if the CPU's random state changes inside its context; here it has to.
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    move_to_cpu = dispatcher.maybe_move_tensor_to_cpu

    def splits_as_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Does as the original, but with as_numpy also converts CPU tensors, which the original
        returns unchanged, because all_to_all needs numbers."""
        moved = move_to_cpu(tensor, as_numpy=as_numpy, record_stream=False)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    dispatcher.maybe_move_tensor_to_cpu = splits_as_numpy

    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim = _uneven_by_sum(
        mappings._gather_along_first_dim, _gather_uneven
    )
    mappings._reduce_scatter_along_first_dim = _uneven_by_sum(
        mappings._reduce_scatter_along_first_dim, _reduce_scatter_uneven
    )


def _uneven_by_sum(
    even: Callable[..., Tensor], uneven: Callable[[Tensor, ProcessGroup, list[int]], Tensor]
) -> Callable[..., Tensor]:
    """Returns a collective that calls `uneven` if parts differ in size, and else `even`.

    gloo gathers and scatters only parts of equal size, but experts that are split over tensor- and
    expert-parallel ranks need parts of any size.
    """

    def collective(
        input_: Tensor,
        group: ProcessGroup,
        split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> Tensor:
        if split_sizes is None or group.size() == 1:
            return even(input_, group, split_sizes, use_global_buffer)
        return uneven(input_, group, split_sizes)

    return collective


def _gather_uneven(input_: Tensor, group: ProcessGroup, split_sizes: list[int]) -> Tensor:
    whole = input_.new_zeros((sum(split_sizes), *input_.shape[1:]))
    whole.split(split_sizes)[group.rank()].copy_(input_)
    torch.distributed.all_reduce(whole, group=group)
    return whole


def _reduce_scatter_uneven(input_: Tensor, group: ProcessGroup, split_sizes: list[int]) -> Tensor:
    whole = input_.clone()
    torch.distributed.all_reduce(whole, group=group)
    part: Tensor = whole.split(split_sizes)[group.rank()]
    return part.clone()
