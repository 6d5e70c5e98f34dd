"""Rounding that keeps the error of a layer's output small: scales, error feedback, sweeps; on torch tensors.

Everywhere: a target T [rows, columns] becomes `Q = levels[codes] * scales`, one scale for each group of consecutive
columns of a row, or of a block of rows, so that the error of the layer's output over calibration inputs x,

    E |(T - Q) x|^2 = tr (T - Q) H (T - Q)^T,   H = E[x x^T]   [columns, columns],

is small. Rows are independent where their scales are.
"""
