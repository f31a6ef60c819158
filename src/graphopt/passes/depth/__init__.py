"""Passes that remove layers."""
