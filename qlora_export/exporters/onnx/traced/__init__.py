"""Graphs of `torch.onnx.export`, for what the model builder lacks: traced without weights, then filled."""
