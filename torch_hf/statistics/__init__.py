"""Sums over cases: gradient moments and Kronecker factors of layers."""
