"""Sharded programs: where values lie, and the programs that ranks run."""
