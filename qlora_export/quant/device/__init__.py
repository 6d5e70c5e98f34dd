"""The kernels of `quant/` for rows that lie on an accelerator: the same functions, the same bytes.

`kernels` takes rows wherever they are, numpy arrays or torch tensors; `torch_kernels` is what it does for tensors;
`accelerator` brings rows there.
"""
