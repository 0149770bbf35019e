"""From FASTA files to a data set that megatron-core reads.

The way of a base: `fasta` reads it, `fragment` lays the grid, `split`, `genes` and `mix` decide
each fragment's fate, `strand` may turn it, `write` stores it. `build` calls them in that order.
"""
