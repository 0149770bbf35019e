"""The decoder: megatron-core's GPT model, described by our layer specs.

Importing this package makes megatron-core importable on this machine, so its modules may import
megatron at their top.
"""

from gengram_megatron.platform import prepare

prepare()
