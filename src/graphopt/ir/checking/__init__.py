"""Comparison of values and programs, used to check contracts, captures and exports."""
