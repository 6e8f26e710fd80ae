"""On the path of the processes that tests start: without PyTorch, which lsg_jax does not need, they start 3 s sooner."""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """The usual finder, for which PyTorch is not installed."""

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname == "torch" else super().find_spec(fullname, path, target)


sys.meta_path[:] = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
