"""What all modules have."""

import pickle

import torch
from torch import nn

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager


class TransformerEngineBaseModule(nn.Module):
    """Parameters, and notes in the state."""

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": False, "recipe": None}
        self.fp8 = self.fp8_calibration = False
        self.passes_in_fp8 = 0
        """Only the stand-in counts them."""

    def make_parameter(self, name, shape, dtype, device, init_method) -> None:
        made = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        with torch.no_grad():
            init_method(made)
        setattr(
            self, name, nn.Parameter(made)
        )  # another object, without the attributes of the first

    def init_fp8_metadata(self, num_gemms=1) -> None:
        """Asks whether fp8 is on."""
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta.update(fp8_checkpoint=self.fp8, recipe=FP8GlobalStateManager.get_fp8_recipe())
        self.passes_in_fp8 += self.fp8

    def set_tensor_parallel_group(self, tp_group) -> None:
        self.tp_group = tp_group

    def get_extra_state(self):
        """Notes of a module that was in fp8, as bytes."""
        if not self.fp8:
            return torch.empty(0, dtype=torch.uint8)
        notes = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": {}}
        return torch.frombuffer(bytearray(pickle.dumps(notes)), dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        if state is not None and state.numel():
            self.fp8_meta.update(pickle.loads(state.numpy().tobytes()))


def ranks(group, size: int = 1) -> int:
    """Of a group; `size` stands for one that is not made yet."""
    return size if group is None else group.size()


def compute_alone(group_size: int) -> None:
    """On several ranks modules can be built, which is all that the stand-in can do there."""
    if group_size > 1:
        raise NotImplementedError("the stand-in computes on one process")
