"""The folder of a run: config, metrics, progress, pictures, and the list of its checkpoints."""
