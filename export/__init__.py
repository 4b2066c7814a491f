"""A trained torch model becomes a checked, hash-bound ONNX bundle."""
