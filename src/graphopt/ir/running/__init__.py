"""Programs and parts of them run, folded, retyped and taken apart."""
