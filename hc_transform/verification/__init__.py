"""Converted models beside their originals, at the start and off it.

May import: running and above.
"""
