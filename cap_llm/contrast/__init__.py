"""Contrastive pruning: units, banks, the loss, the terms. Knows no text."""
