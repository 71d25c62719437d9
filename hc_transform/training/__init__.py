"""After conversion: groups for optimisers, saving and loading, the way back, diagnostics.

May import: everything but measuring. Nothing of the package imports it but ``__init__``.
"""
