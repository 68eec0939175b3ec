"""Which models live together, on how many GPUs, and why."""
