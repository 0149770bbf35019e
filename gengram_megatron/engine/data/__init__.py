"""Samples in order, from built data sets to the microbatches of a rank."""
