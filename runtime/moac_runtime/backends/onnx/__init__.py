"""The package's ONNX graph, by onnxruntime."""
