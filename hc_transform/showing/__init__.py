"""What was done, to be seen: printouts of rewritten graphs, the code of a block before and after, drawings.

May import: anything but measuring.
"""

from .difference import diff
from .drawing import draw
from .printout import Printout, show

__all__ = ["Printout", "diff", "draw", "show"]
