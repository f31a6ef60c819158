"""Capture of models: modules with examples, Hugging Face checkpoints, saved programs, exported programs."""
