"""From a model to a graph: the tracer, the tape of a real run, and guards on all that they found.

May import: streams, models, graphs.
"""
