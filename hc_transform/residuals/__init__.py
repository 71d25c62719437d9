"""From a graph to a plan: verdicts on adds, names, trunks, and which modules run graphs.

May import: connections and options, and all of capture and above.
"""
