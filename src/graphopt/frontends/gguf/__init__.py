"""GGUF files, llama.cpp's one-file checkpoints, read like a Hugging Face folder."""
