"""ONNX for ONNX Runtime and ONNX Runtime GenAI: graphs of the GenAI model builder, with its weights or with ours.

On disk: `model.onnx`, `model.onnx.data` (the name is written into the graph: never rename it), `genai_config.json`, and
the source's tokenizer files, byte for byte.
"""
