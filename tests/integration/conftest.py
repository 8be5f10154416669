import pytest


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where a module's app keeps its GPUs, its config and its log."""
    return tmp_path_factory.mktemp("app")
