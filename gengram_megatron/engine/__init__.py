"""Everything that imports torch or megatron-core: the model, its training and its checkpoints.

Importing this package, or any module of it, first makes megatron-core importable on this machine
(platform/), so that the modules can import megatron-core at their top.
"""

from gengram_megatron.engine.platform import prepare

prepare()
