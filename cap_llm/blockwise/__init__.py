"""The walk over a model's blocks, and the stages that stand on it."""
