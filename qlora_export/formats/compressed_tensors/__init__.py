"""compressed-tensors, the formats that vLLM serves: one file for integers, one for floats, one for what both state.

Every weight is rounded once to the dtype of the model, in which the library computes, and then coded byte for byte as
compressed-tensors 0.20 codes it, rounded to nearest. The library itself is not needed to write them.
"""
