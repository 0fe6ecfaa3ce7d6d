"""What a model is worth: perplexity as the papers measure it, and the report."""
