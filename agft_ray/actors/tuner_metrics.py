"""What a tuner shows in Ray's metrics."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from agft_ray.gpu.base import Gpu
from agft_ray.telemetry.status import TunerState
from agft_ray.tuner import Tuner, WindowRecord
from agft_ray.types import Actuator

TAGS = ("application", "deployment", "replica", "gpu_uuid")
GAUGES = {
    "agft_locked_sm_clock_mhz": "SM clock that is locked; 0: default clocks",
    "agft_power_limit_w": "Power limit that is set; 0: the one found",
    "agft_sm_clock_mhz": "Mean effective SM clock of the window",
    "agft_power_w": "Mean power of the window",
    "agft_tpot_s": "Mean time per output token of the window",
    "agft_reward": "Reward of the window",
    "agft_clock_change_s": "How long a change of the SM clock takes, median of the last ones",
    "agft_tuner_tuning": "1 while a policy chooses the clock, else 0",
}
COUNTERS = {
    "agft_clock_changes": "Changes of what is locked",
    "agft_phase_changes": "Those of them within a plan, when the engine did something else",
    "agft_phase_changes_put_off": "Phases whose clock had to wait: too many changes in a second",
    "agft_energy_j": "Energy of all windows",
    "agft_windows": "Windows observed",
    "agft_pressure_windows": "Those of them after which pressure led to default clocks",
}
"""Ray exports all of them as `ray_agft_*`, counters with `_total` behind it."""
_LOCKED = {
    Actuator.SM_CLOCK: "agft_locked_sm_clock_mhz",
    Actuator.POWER_LIMIT: "agft_power_limit_w",
}


class TunerMetrics:
    """Gauges and counters of one tuner, exported by Ray as `ray_agft_*`.

    Of several GPUs that are tuned as one, what is locked has a series for each, whose `gpu_uuid`
    is that of Ray's own GPU metrics; all else is the group's, under all UUIDs joined by commas.
    """

    def __init__(self, application: str, deployment: str, replica: str, gpu: Gpu) -> None:
        tags = dict(zip(TAGS, (application, deployment, replica, gpu.uuid), strict=True))

        def gauge(name: str) -> Gauge:
            metric = Gauge(name, description=GAUGES[name], tag_keys=TAGS)
            metric.set_default_tags(tags)
            return metric

        def counter(name: str) -> Counter:
            metric = Counter(name, description=COUNTERS[name], tag_keys=TAGS)
            metric.set_default_tags(tags)
            return metric

        self._gpus = [{"gpu_uuid": uuid} for uuid in gpu.uuid.split(",")]
        self._locked = gauge(_LOCKED[gpu.actuator])
        self._changes = [
            counter("agft_clock_changes"),
            counter("agft_phase_changes"),
            counter("agft_phase_changes_put_off"),
        ]
        self._changes_shown = [0, 0, 0]
        self._sm_clock = gauge("agft_sm_clock_mhz")
        self._power = gauge("agft_power_w")
        self._tpot = gauge("agft_tpot_s")
        self._reward = gauge("agft_reward")
        self._clock_change = gauge("agft_clock_change_s")
        self._tuning = gauge("agft_tuner_tuning")
        self._energy = counter("agft_energy_j")
        self._windows = counter("agft_windows")
        self._pressure = counter("agft_pressure_windows")

    def show(self, tuner: Tuner) -> None:
        """Publish what is in force, every second or so, also while there are no windows."""
        self._tuning.set(float(tuner.state == TunerState.TUNING))
        for gpu in self._gpus:
            self._locked.set(tuner.control.locked or 0, tags=gpu)
        control = tuner.control
        counts = control.changes, control.phase_changes, control.phase_changes_put_off
        for index, changes in enumerate(counts):
            if changes > self._changes_shown[index]:
                self._changes[index].inc(changes - self._changes_shown[index])
                self._changes_shown[index] = changes

    def export(self, record: WindowRecord) -> None:
        """Publish a window; what is unknown keeps its last value."""
        self._windows.inc()
        if record.decision.reason == TunerState.PRESSURE:
            self._pressure.inc()
        window = record.window
        if window is None:
            return
        self._sm_clock.set(window.sm_clock_mhz)
        self._power.set(window.mean_power_w)
        if window.energy_j > 0:
            self._energy.inc(window.energy_j)
        if window.tpot_s is not None:
            self._tpot.set(window.tpot_s)
        if window.clock_change_s is not None:
            self._clock_change.set(window.clock_change_s)
        if record.reward is not None:
            self._reward.set(record.reward)
