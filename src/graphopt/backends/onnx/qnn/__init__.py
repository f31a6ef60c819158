"""Qualcomm's HTP, by its compiler and simulator: placement, context binaries, and what they compute."""
