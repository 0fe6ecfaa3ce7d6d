"""Contrastive objectives: units, banks, loss and terms. Independent of text."""
