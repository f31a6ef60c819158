"""Tensor parallelism: sharding blocks, merging reductions, dropping and quantising them."""
