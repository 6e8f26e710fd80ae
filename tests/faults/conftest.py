"""The catalogue of faults: one file a kind, each fault a row. `docs/trust.md` says what is promised.

Property-based tests draw the same examples in every run; `pytest -m soak` runs their long form, and the kills.
"""

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", derandomize=True, max_examples=40, **_COMMON)
settings.register_profile("soak", derandomize=False, max_examples=int(os.environ.get("LSG_SOAK_EXAMPLES", "2000")), **_COMMON)
settings.load_profile("fixed")
