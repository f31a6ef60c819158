"""Exact passes that fuse and split projections and fold norms."""
