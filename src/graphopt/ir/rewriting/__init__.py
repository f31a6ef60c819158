"""Pattern matching and subgraph rewriting with functions of tensors, and the rules that clean recorded graphs."""
