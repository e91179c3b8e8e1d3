"""The dense model: its files, its tensors, and one pass through it."""
