"""End-to-end training of a pruned model: engines, objectives, contrast, the schedule of levels."""
