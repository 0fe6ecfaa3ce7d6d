"""Which weights are zero: patterns, the choice of masks, and zeros during training."""
