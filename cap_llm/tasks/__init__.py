"""Tasks: data, head, losses and metric of a training."""
