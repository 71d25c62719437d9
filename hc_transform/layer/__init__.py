"""Hyper-connections written by hand: the layer around one branch, and streams packed into a tensor.

May import: streams and connections.
"""
