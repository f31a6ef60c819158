"""Outputs beside the logits: heads, drafts, exits and mask tokens; trimmed vocabularies."""
