"""Where a model looks while it answers: the attention of answer tokens on the visual tokens, with and without sinks."""

from lsg_jax.look.look import Look

__all__ = ["Look"]
