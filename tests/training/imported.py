"""What every rank imports; see ranks.py."""

import torch

torch.set_num_threads(1)
import torch._dynamo  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch.utils.tensorboard  # noqa: E402
