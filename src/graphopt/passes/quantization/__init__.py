"""Quantisation: ranges of values, rounding fitted to data, and which matrices tolerate few bits."""
