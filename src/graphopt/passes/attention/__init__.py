"""Passes over what attention sees."""
