"""Weights that are stored as few-bit codes with scales, and what moving their entries does to them."""
