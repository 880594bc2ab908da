"""Solvers: weights and statistics in, codes on a grid out. Pure; torch for matrices, Numba for what it cannot do."""
