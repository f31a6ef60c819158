"""Passes over run-time settings."""
