"""A tuner's loop in a process of its own, on a simulated GPU; prints when which clock is set.

    python phase_follower.py DEVICE_FILE

The engine's statistics are made up here: it is always busy. It ends with its parent, also while it
is stopped: else it would keep the pipe that the tests' output goes to.
"""

import ctypes
import signal
import sys
import threading
import time

from agft_ray.actors.messages import EngineIdentity, TunerSpec
from agft_ray.actors.tuner_loop import TunerLoop
from agft_ray.gpu.config import SimulatedGpuConfig
from agft_ray.gpu.registry import GpuSpec
from agft_ray.gpu.simulated import SimulatedGpu
from agft_ray.settings import TunerConfig
from agft_ray.telemetry.inbox import EngineInbox
from agft_ray.telemetry.ray_metrics import ServeMetrics
from agft_ray.types import EngineSample

PAIR = {"name": "pair", "prefill_sm_clock_mhz": 1500, "decode_sm_clock_mhz": 1200}
PR_SET_PDEATHSIG = 1
_lock = SimulatedGpu.lock


def told_lock(gpu, setting):
    _lock(gpu, setting)
    print(time.monotonic(), setting, flush=True)


def main():
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    SimulatedGpu.lock = told_lock
    inbox = EngineInbox()
    spec = TunerSpec(
        application="a",
        deployment="d",
        replica="r",
        gpu=GpuSpec(SimulatedGpuConfig(), (sys.argv[1],)),
        engine=EngineIdentity("llama-3.1-8b"),
    )
    loop = TunerLoop(
        spec, engine=inbox, serve=ServeMetrics(max_age_s=1.0), on_record=lambda tuner, record: None
    )
    loop.take(TunerConfig(policy=PAIR, window_s=0.5, settle_s=0.1), 0)
    threading.Thread(target=sys.stdin.read, name="end", daemon=True).start()
    tokens = 0
    while any(thread.name == "end" for thread in threading.enumerate()):
        tokens += 5
        sample = EngineSample(
            t_s=loop.clock.now_s(),
            running=2,
            generation_tokens=tokens,
            iterations=tokens,
            itl_sum_s=0.02 * tokens,
            itl_count=tokens,
        )
        inbox.push(sample)
        loop.hear()
        time.sleep(0.1)
    loop.release()
    loop.wait_ended(5.0)


if __name__ == "__main__":
    main()
