"""Tasks: the data, head, losses and metric of a training."""
