"""Fewer experts, or fewer of them active."""
