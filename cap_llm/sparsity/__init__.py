"""Which weights go: patterns, masks and layer budgets."""
