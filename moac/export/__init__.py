"""The portable target: the decoder and its span caches as one ONNX graph."""
