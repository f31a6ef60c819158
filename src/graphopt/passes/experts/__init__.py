"""Passes that remove experts, or let fewer of them be active."""
