"""On the path of the processes that tests start: without PyTorch, which lsg_jax does not need, they start 3 s sooner."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]  # import says that there is no such module
