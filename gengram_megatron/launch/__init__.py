"""Starting runs: torchrun on this machine, or jobs of Slurm."""
