"""Numba kernels for the CPU and their GPU twins. Nothing outside this folder knows about speed.

All kernels release the GIL and none starts threads of its own: the caller decides how many slabs run at once.
"""
