"""Code that a test gives to Python's start (as sitecustomize.py): the second rank fails in its
first step, by an accident or by something that a person can mend."""

BROKEN = """
import os
if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "1":
    import gengram_megatron.engine.training.step as step
    def forward_backward(*_, **__):
        raise RuntimeError("the disk is gone")
    step.forward_backward = forward_backward
"""

MENDABLE = BROKEN.replace("RuntimeError(", "UserError(").replace(
    "import os", "import os\nfrom gengram_megatron.errors import UserError"
)
