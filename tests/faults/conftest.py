"""The catalogue of faults: one file a kind, each fault a row. `docs/trust.md` says what is promised.

Property-based tests draw the same examples in every run; `pytest -m soak` runs their long form, and the kills.
"""

import os

import pytest
from commands import make_inputs
from fork_server import ForkServer
from hypothesis import HealthCheck, settings
from runs import Runner

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fixed", derandomize=True, max_examples=40, **_COMMON)
settings.register_profile("soak", derandomize=False, max_examples=int(os.environ.get("LSG_SOAK_EXAMPLES", "2000")), **_COMMON)
settings.load_profile("fixed")


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("scratch"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def inputs(server, tmp_path_factory, tiny_hf_folder, tiny_model, records, scenes):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder, hf=tiny_hf_folder, model=tiny_model, records=records, scenes=scenes)
    trained = Runner(server, folder, folder, ["train", f"{folder}/run.toml"]).run()
    assert trained[0] == 0, trained
    return folder
