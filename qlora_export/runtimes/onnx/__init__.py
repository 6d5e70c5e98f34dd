"""ONNX folders in the layout of ONNX Runtime GenAI: opened only after a look, run in every way, and compared."""
