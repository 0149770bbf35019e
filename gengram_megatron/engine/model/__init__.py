"""The decoder, described by layer specs of megatron-core, and its memory (`gengram/`)."""
