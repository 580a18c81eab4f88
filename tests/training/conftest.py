"""What tests of several files use."""

import pytest

from tests.helpers.vllm_stand_in import StandIn, serving


@pytest.fixture
def server():
    """A stand-in for a vLLM server, as it can be set."""
    return StandIn()


@pytest.fixture
def url(server):
    with serving(server) as url:
        yield url
