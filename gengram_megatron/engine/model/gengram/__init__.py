"""Gengram memory. The modules follow the paper: `ids` of the k-mers that end at each token, look-up
in the `tables`, `pooling` over the window, `projection` to key and value. `memory` combines them
and has the gate and the output; with `projected`, the tables are projected instead of the
features."""
