"""Functions of tensors as patterns and as replacements, and the rules that recorded graphs pass through."""
