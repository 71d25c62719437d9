"""Streams: how n tensors in place of a value are made, mixed, read out, and handed from block to block.

May import: errors.
"""
