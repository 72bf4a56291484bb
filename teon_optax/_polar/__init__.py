"""Polar factors of matrices: coefficients, precision, and every product."""
