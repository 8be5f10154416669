"""A GPU node that is lost, in each way, leaves its GPU at default clocks; the replacement on the
next node tunes that one's GPU. Real Ray and Serve, a head without GPUs, fake NVMLs.
"""

import time

import pytest
from rig import running

pytestmark = pytest.mark.ray

RESET_S = 2.0
"""From the end of the tuner, which Ray ends as it sees the node gone."""


class Nodes:
    """The cluster's GPU node: one at a time, and each a GPU of its own."""

    def __init__(self, driver, make_gpu):
        self.driver, self._make_gpu = driver, make_gpu
        self._count = 0
        self.add()
        driver.deploy(None)

    def add(self):
        self._count += 1
        self.gpu = self._make_gpu(f"gpu-{self._count}")
        self.driver.add_gpu_node(self.gpu.env_vars)

    def lost(self, row, holder, since_s):
        """The GPU is reset and let go; the next node's is locked in its stead."""
        reset = self.gpu.wait_reset(row, holder, RESET_S)
        print(f"{row}: reset {reset.t_ns * 1e-9 - since_s:.3f} s after the act")
        self.gpu.wait_let_go(holder)
        assert self.gpu.is_untouched
        self.gpu.check_writers()
        lost = self.gpu
        self.add()
        self.gpu.wait_locked()
        assert lost.is_untouched


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    with running("nodes", tmp_path_factory.mktemp("chaos")) as (driver, _, make_gpu):
        nodes = Nodes(driver, make_gpu)
        yield nodes
    assert nodes.gpu.is_untouched


@pytest.fixture
def holder(nodes):
    return nodes.gpu.wait_locked()


def test_raylet_is_killed(nodes, holder):
    since_s = time.monotonic()
    nodes.driver.kill_raylet()
    nodes.lost("SIGKILL of the raylet", holder, since_s)


@pytest.mark.parametrize("graceful", [True, False], ids=["graceful", "not graceful"])
def test_node_is_removed(nodes, holder, graceful):
    since_s = time.monotonic()
    nodes.driver.remove_gpu_node(graceful)
    nodes.lost(f"removal of the node, graceful={graceful}", holder, since_s)


def test_driver_is_killed(nodes, holder):
    nodes.driver.kill()  # the cluster's processes are its own, and end with it
    nodes.gpu.wait_reset("SIGKILL of the driver", holder, RESET_S)
    nodes.gpu.wait_let_go(holder)
