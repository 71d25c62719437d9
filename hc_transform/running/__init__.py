"""What runs rewritten graphs: the one that fits a call, traced again where none does.

May import: rewriting and above.
"""
