"""Parts of sharding: cutting values, placing blocks, merging sums."""
