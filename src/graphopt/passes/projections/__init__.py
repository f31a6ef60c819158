"""Projections and norms, merged and taken apart exactly."""
