"""The parts of insert-kv-cache: what depends on positions, what an attention stores, and the comparison in pieces."""
