"""From a plan to a graph of streams, and the new modules that it calls.

May import: residuals and above.
"""
