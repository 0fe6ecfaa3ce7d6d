"""Text: corpora, tokenizers, and windows of tokens."""
