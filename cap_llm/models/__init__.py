"""Models: where they come from, their files, and how they look to the rest: embed, blocks, head."""
