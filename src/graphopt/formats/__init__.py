"""Layouts in which quantised weights lie in checkpoints: read as codes with scales, and written back."""
