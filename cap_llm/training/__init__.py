"""The training loop on DeepSpeed. Knows no language model."""
