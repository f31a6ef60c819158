"""Exports of programs: modules, exported programs, ONNX files and Hugging Face folders."""
