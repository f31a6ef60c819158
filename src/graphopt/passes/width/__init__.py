"""Parts of passes that change the width of feed-forwards: importance of hidden channels, and taking some of them."""
