"""Facts about the nodes of torch.fx graphs, whoever made them, and the code of graphs.

May import: streams, models.
"""
