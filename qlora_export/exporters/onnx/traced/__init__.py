"""Graphs of `torch.onnx.export`, for architectures that the model builder lacks: traced without weights, filled after."""
