"""Components of insert-cache: values that depend on positions, stored keys and values, and the comparison in chunks."""
