"""The bytes that a rank sends to others through torch's process groups."""

from collections import Counter

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PASSES = {
    "allreduce_": 2,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "allgather_into_tensor_coalesced_": 1,
    "reduce_scatter_tensor_coalesced_": 1,
    "alltoall_base_": 1,
}
"""How often a ring of n ranks sends (n - 1) / n of a collective's larger tensor."""
RECEIVING = ("recv_",)


def sent(operation: str, sizes: list[int], ranks: int) -> float:
    """Bytes, from those of all tensors that the operation is called with."""
    if operation == "send":
        return sum(sizes)
    if operation == "alltoall_base_":
        larger = sizes[1]  # what goes out, its own part included
    elif operation == "allreduce_":
        larger = sum(sizes)
    else:
        larger = sum(sizes) * ranks / (ranks + 1)  # a whole and a part each
    return PASSES[operation] * larger * (ranks - 1) / ranks


class Traffic(TorchDispatchMode):
    """sent[operation]: bytes, while it is entered."""

    def __init__(self):
        super().__init__()
        self.sent = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, arguments: list) -> None:
        sizes = [x.nbytes for x in arguments if isinstance(x, Tensor)]
        ranks = next(dist.ProcessGroup.unbox(x).size() for x in arguments if _is_group(x))
        if ranks > 1 and operation not in RECEIVING:
            self.sent[operation] += sent(operation, sizes, ranks)


def _is_group(value) -> bool:
    return type(value).__name__ == "ScriptObject" and "ProcessGroup" in str(value._type())
