"""Outputs beside the logits: heads, drafts, exits, mask tokens, and vocabularies cut short."""
