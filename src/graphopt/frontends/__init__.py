"""How models come in: modules with examples, Hugging Face checkpoints, saved programs, exported programs."""
