"""The bytes of all tensors that are alive, now and at most."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Meter(TorchDispatchMode):
    """Sees every operation's results while it is entered, in the backward pass too. Tensors that
    share a storage count once, and until the last of them is gone or the storage is emptied."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.most = 0
        self.bound = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._see(result.untyped_storage())
        if self.bound > self.most:
            self.most = max(self.most, self.now())
        return results

    def now(self) -> int:
        """Bytes at this moment."""
        storages = [reference() for reference in self.alive.values()]
        self.bound = sum(storage.nbytes() for storage in storages if storage is not None)
        return self.bound

    def start_again(self) -> None:
        """Forget what was most."""
        self.most = self.now()

    def _see(self, storage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))
            self.bound += storage.nbytes()
