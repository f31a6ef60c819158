"""Passes, plans and contracts, and running pipelines of them."""
