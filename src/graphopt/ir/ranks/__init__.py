"""Sharded programs: placements of values, and the programs that ranks run."""
