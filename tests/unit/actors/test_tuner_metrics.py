"""What a tuner exports; the metrics of Ray are FAKES that keep what they are told, by labels."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from agft_ray.actors import tuner_metrics
from agft_ray.actors.tuner_metrics import TunerMetrics
from agft_ray.tuner import WindowRecord
from agft_ray.types import Actuator, Decision

KEYS = ("application", "deployment", "replica", "gpu_uuid")


class FakeMetric:
    def __init__(self, name, description, tag_keys):
        assert description
        assert tag_keys == KEYS
        self.name, self.tags, self.values = name, {}, {}

    def set_default_tags(self, tags):
        self.tags = tags

    def set(self, value, tags=None):
        self.values[self._key(tags)] = value

    def inc(self, value=1.0, tags=None):
        assert value > 0
        key = self._key(tags)
        self.values[key] = self.values.get(key, 0.0) + value

    def _key(self, tags):
        tags = self.tags | (tags or {})
        return tuple(tags[name] for name in KEYS)


@pytest.fixture
def made(monkeypatch):
    """The metrics that were made, by name."""
    found = {}

    def make(name, **options):
        found[name] = FakeMetric(name, **options)
        return found[name]

    monkeypatch.setattr(tuner_metrics, "Gauge", make)
    monkeypatch.setattr(tuner_metrics, "Counter", make)
    return found


def metrics_of(uuid="GPU-1", actuator=Actuator.SM_CLOCK):
    return TunerMetrics("llm", "Server:m", "r1", SimpleNamespace(uuid=uuid, actuator=actuator))


def tuner(*, state="tuning", locked=None, changes=0):
    control = SimpleNamespace(
        locked=locked,
        changes=changes,
        phase_changes=changes // 2,
        phase_changes_put_off=changes // 4,
    )
    return SimpleNamespace(state=state, control=control)


def series(uuid="GPU-1"):
    return "llm", "Server:m", "r1", uuid


def test_what_is_locked_is_exported_and_0_is_default_clocks(made):
    metrics = metrics_of()
    metrics.show(tuner(locked=1230, changes=1))
    assert made["agft_locked_sm_clock_mhz"].values == {series(): 1230}
    assert made["agft_tuner_tuning"].values == {series(): 1.0}
    metrics.show(tuner(state="off", changes=2))
    assert made["agft_locked_sm_clock_mhz"].values == {series(): 0}
    assert made["agft_tuner_tuning"].values == {series(): 0.0}


def test_clock_changes_are_counted(made):
    metrics = metrics_of()
    metrics.show(tuner())
    assert made["agft_clock_changes"].values == {}
    for changes in (1, 1, 4):
        metrics.show(tuner(changes=changes))
    assert made["agft_clock_changes"].values == {series(): 4}
    assert made["agft_phase_changes"].values == {series(): 2}
    assert made["agft_phase_changes_put_off"].values == {series(): 1}


def test_a_groups_lock_has_a_series_for_each_gpu_as_rays_own_metrics_have(made, make_window):
    metrics = metrics_of("GPU-1,GPU-2")
    metrics.show(tuner(locked=1230))
    metrics.export(WindowRecord(1.0, make_window(energy_j=7.0), None, Decision(1230, "fixed")))
    assert made["agft_locked_sm_clock_mhz"].values == {
        series("GPU-1"): 1230,
        series("GPU-2"): 1230,
    }
    assert made["agft_energy_j"].values == {series("GPU-1,GPU-2"): 7.0}


def test_a_power_limit_is_no_clock(made):
    metrics_of(actuator=Actuator.POWER_LIMIT).show(tuner(locked=300))
    assert made["agft_power_limit_w"].values == {series(): 300}
    assert "agft_locked_sm_clock_mhz" not in made


def test_windows_are_exported(made, make_window):
    metrics = metrics_of()
    window = make_window(energy_j=400.0, sm_clock_mhz=1229.0, mean_power_w=200.0)
    window = replace(window, clock_change_s=0.025)
    metrics.export(WindowRecord(12.0, window, -0.5, Decision(1230, "fixed")))
    metrics.export(WindowRecord(14.0, None, None, Decision(None, "blind"), "stale"))
    metrics.export(WindowRecord(16.0, None, None, Decision(None, "pressure")))
    values = {name: metric.values.get(series()) for name, metric in made.items()}
    assert values["agft_windows"] == 3
    assert values["agft_pressure_windows"] == 1
    assert values["agft_clock_change_s"] == 0.025
    assert values["agft_energy_j"] == 400.0
    assert values["agft_sm_clock_mhz"] == 1229.0
    assert values["agft_power_w"] == 200.0
    assert values["agft_tpot_s"] == 9.0 / 300
    assert values["agft_reward"] == -0.5
