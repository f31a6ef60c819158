"""Passes that change the width of feed-forwards: importance of hidden channels, and selecting some of them."""
