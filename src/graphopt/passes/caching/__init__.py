"""Components of insert-kv-cache: values that depend on positions, stored keys and values, and the comparison in chunks."""
