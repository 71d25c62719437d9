"""What code costs: times, and kernels and bytes counted without a GPU.

May import: anything.
"""
