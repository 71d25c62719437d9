"""nn.Modules and what they compute with: copies that share tensors, state put back, examples, comparison.

May import: streams.
"""
