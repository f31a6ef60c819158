"""Programs as ONNX files, for ONNX Runtime, onnxruntime-genai and NPUs."""
