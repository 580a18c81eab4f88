"""Every test of the kernels runs with every set of tiles."""

import pytest


@pytest.fixture(autouse=True)
def _tiles(tiles):
    pass
