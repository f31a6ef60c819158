"""What a pass is, how pipelines run, and how contracts are held."""
