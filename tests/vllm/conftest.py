"""One server for all tests that leave it as it is."""

import pytest

from tests.helpers.vllm_process import RIGHT, UPDATING, Server, save_toy, serving


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> str:
    """The folder of the model."""
    return save_toy(tmp_path_factory.mktemp("toy") / "model")


@pytest.fixture(scope="session")
def server(base, tmp_path_factory):
    started = Server(base, tmp_path_factory.mktemp("server") / "log.txt", *RIGHT, **UPDATING)
    with serving(started):
        yield started
