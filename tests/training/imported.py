"""What every rank imports; see ranks.py."""

import torch

from gengram_megatron.platform import prepare

torch.set_num_threads(1)
prepare()

import torch._dynamo  # noqa: E402
import torch._inductor.config  # noqa: E402
import torch.utils.tensorboard  # noqa: E402

import gengram_megatron.checkpoint.state  # noqa: E402
import gengram_megatron.cli  # noqa: E402
import gengram_megatron.model.build  # noqa: E402
import gengram_megatron.training.optimizer  # noqa: E402
import gengram_megatron.training.plot  # noqa: E402
import gengram_megatron.training.progress  # noqa: E402
import gengram_megatron.training.run  # noqa: E402, F401
