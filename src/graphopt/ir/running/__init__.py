"""Running, folding, retyping and splitting programs."""
