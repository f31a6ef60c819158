"""Programs as Hugging Face folders."""
