"""Calibration: the text that data-aware rounding looks at, and what is learnt from it."""
