"""What every rank imports; see ranks.py."""

import torch

from gengram_megatron.engine.platform import prepare

torch.set_num_threads(1)
prepare()

import torch._dynamo  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
