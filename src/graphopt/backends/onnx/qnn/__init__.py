"""Qualcomm's HTP through its compiler and simulator: node placement, context binaries and computed values."""
