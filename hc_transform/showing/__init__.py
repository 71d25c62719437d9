"""What was done, to be seen: printouts of graphs, a block before and after, drawings, a page, the command line.

May import: anything.
"""

from .difference import diff
from .drawing import draw
from .printout import Printout, show

__all__ = ["Printout", "diff", "draw", "show"]
