"""Shows what is in a built data set: counts, composition, and where each sample comes from."""
