"""What a tuner shows in Ray's metrics."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from agft_ray.tuner import WindowRecord

TAGS = ("application", "deployment", "replica", "gpu_uuid")


class TunerMetrics:
    """Gauges and counters of one tuner, exported by Ray as `ray_agft_*`."""

    def __init__(self, application: str, deployment: str, replica: str, gpu_uuid: str) -> None:
        tags = dict(zip(TAGS, (application, deployment, replica, gpu_uuid), strict=True))

        def gauge(name: str, description: str) -> Gauge:
            metric = Gauge(name, description=description, tag_keys=TAGS)
            metric.set_default_tags(tags)
            return metric

        def counter(name: str, description: str) -> Counter:
            metric = Counter(name, description=description, tag_keys=TAGS)
            metric.set_default_tags(tags)
            return metric

        self._sm_clock = gauge("agft_sm_clock_mhz", "Mean effective SM clock of the window")
        self._power = gauge("agft_power_w", "Mean power of the window")
        self._tpot = gauge("agft_tpot_s", "Mean time per output token of the window")
        self._reward = gauge("agft_reward", "Reward of the window")
        self._tuning = gauge("agft_tuner_tuning", "1 while a policy chooses the clock, else 0")
        self._energy = counter("agft_energy_j", "Energy of all windows")
        self._windows = counter("agft_windows", "Windows observed")

    def export(self, record: WindowRecord, *, state: str) -> None:
        """Publish a window; what is unknown keeps its last value."""
        self._windows.inc()
        self._tuning.set(float(state == "tuning"))
        window = record.window
        if window is None:
            return
        self._sm_clock.set(window.sm_clock_mhz)
        self._power.set(window.mean_power_w)
        if window.energy_j > 0:
            self._energy.inc(window.energy_j)
        if window.tpot_s is not None:
            self._tpot.set(window.tpot_s)
        if record.reward is not None:
            self._reward.set(record.reward)
