"""Gengram memory, in the order of the paper: `ids` of the k-mers that end at each token, the look-up
in the `tables`, the `pooling` over the window, the `projection` to key and value, the `gate`, and
the `output` with its convolution. `memory` puts them together."""
