"""How programs leave: as modules, exported programs, ONNX files and Hugging Face folders."""
