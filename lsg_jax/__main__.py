"""`python -m lsg_jax` is `lsg`."""

import sys

from lsg_jax.cli import main

sys.exit(main())
