"""What computes: the model, its training, its checkpoints. All that imports torch or megatron-core.

Importing this package, and so any module of it, makes megatron-core importable on this machine
first (platform/), so that its modules import megatron-core at their top.
"""

from gengram_megatron.engine.platform import prepare

prepare()
