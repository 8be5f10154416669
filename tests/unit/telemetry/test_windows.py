import pytest

from agft_ray.telemetry.windows import WindowRejectedError, close_window
from agft_ray.types import COUNTERS, EventReason, Histogram, Plan, ServeWindow, StepTotals


def close(engine, gpu, **changes):
    fixed = {"plan": Plan.of(1230), "window_s": 2.0, "serve": None}
    arguments = fixed | {"engine": engine, "gpu": gpu}
    return close_window(**arguments | changes)


@pytest.fixture
def engine(make_engine_sample):
    return [
        make_engine_sample(
            10.0 + 0.5 * i,
            running=2 + i,
            waiting=i,
            kv_cache_usage=0.1 * i,
            generation_tokens=100 * i,
            iterations=20 * i,
            iteration_tokens=120 * i,
            itl_sum_s=2.0 * i,
            itl_count=100 * i,
            ttft_sum_s=0.25 * i,
            ttft_count=i,
            decode_steps=StepTotals(18 * i, 100 * i, 0.4 * i),
            prefill_steps=StepTotals(2 * i, 20 * i, 0.1 * i),
        )
        for i in range(5)
    ]


@pytest.fixture
def gpu(make_gpu_sample):
    return [make_gpu_sample(10.0 + 0.25 * i) for i in range(9)]


def test_deltas_means_and_ratios(engine, gpu):
    window = close(engine, gpu)
    assert (window.start_s, window.end_s, window.duration_s) == (10.0, 12.0, 2.0)
    assert window.generation_tokens == 400
    assert window.tpot_s == pytest.approx(0.02)
    assert window.ttft_s == pytest.approx(0.25)
    assert (window.running, window.waiting) == (4.0, 2.0)
    assert window.kv_cache_usage == pytest.approx(0.2)
    assert window.decode_steps == StepTotals(72, 400, 1.6)
    assert window.energy_j == pytest.approx(400.0)
    assert window.mean_power_w == pytest.approx(200.0)
    assert window.edp_j_s == pytest.approx(8.0)
    assert window.request_rate_per_s == pytest.approx(2.0)


def test_energy_is_matched_by_the_counters_own_update_times(engine, make_gpu_sample):
    # Power steps from 100 to 300 W at 11 s; the counter ticks every 0.4 s, out of phase.
    def energy(t_s):
        return 100.0 * t_s + 200.0 * max(0.0, t_s - 11.0)

    ticks = [9.8, 10.2, 10.6, 11.0, 11.4, 11.8, 12.2]
    gpu = [make_gpu_sample(t + 0.19, energy(t), energy_t_s=t) for t in ticks]
    assert close(engine, gpu).energy_j == pytest.approx(energy(12.0) - energy(10.0))


def test_energy_is_continued_when_the_counter_lags(engine, make_gpu_sample):
    gpu = [make_gpu_sample(t, 200.0 * t, energy_t_s=t) for t in (10.1, 10.9, 11.7)]
    assert close(engine, gpu).energy_j == pytest.approx(400.0)


def test_clock_is_the_mean_while_working(engine, make_gpu_sample):
    gpu = [
        make_gpu_sample(10.0, sm_clock_mhz=210, event_reasons=EventReason.GPU_IDLE),
        make_gpu_sample(11.0, sm_clock_mhz=1200),
        make_gpu_sample(12.0, sm_clock_mhz=1230, event_reasons=EventReason.SW_POWER_CAP),
    ]
    window = close(engine, gpu)
    assert window.sm_clock_mhz == 1215.0
    assert window.event_reasons == EventReason.SW_POWER_CAP | EventReason.GPU_IDLE


def test_serves_request_rate_goes_before_the_engines(engine, gpu):
    serve = ServeWindow(request_rate_per_s=7.0, mean_latency_s=1.0, in_flight=3.0, age_s=0.5)
    assert close(engine, gpu, serve=serve).request_rate_per_s == 7.0


def test_what_makes_no_window(engine, gpu, make_engine_sample, make_gpu_sample):
    with pytest.raises(WindowRejectedError, match="at least 2"):
        close(engine[:1], gpu)
    with pytest.raises(WindowRejectedError, match="generation_tokens"):
        close([*engine, make_engine_sample(12.5)], gpu)
    with pytest.raises(WindowRejectedError, match="did not move"):
        close(engine, [make_gpu_sample(t, 5.0, energy_t_s=9.0) for t in (10.0, 12.0)])
    with pytest.raises(WindowRejectedError, match="went backwards"):
        close(engine, [make_gpu_sample(10.0, 1000.0), make_gpu_sample(12.0, 3.0)])
    with pytest.raises(WindowRejectedError, match=r"2\.0 s instead of 0\.5"):
        close(engine, gpu, window_s=0.5)


NUMBERS = [name for name in COUNTERS if not name.endswith(("_steps", "_histogram"))]


@pytest.mark.parametrize("name", COUNTERS)
def test_a_window_has_what_each_counter_has_grown_by(name, gpu, make_engine_sample):
    counter = {"steps": StepTotals, "histogram": lambda n: Histogram((n,))}
    one, two = map(counter.get(name.rpartition("_")[2], int), (5, 8))
    samples = [make_engine_sample(10.0, **{name: one}), make_engine_sample(12.0, **{name: two})]
    assert getattr(close(samples, gpu), name) == two - one


@pytest.mark.parametrize("name", NUMBERS)
def test_a_counter_that_fell_and_rose_again_makes_no_window(name, gpu, make_engine_sample):
    samples = [make_engine_sample(10.0 + i, **{name: n}) for i, n in enumerate((5, 4, 8))]
    with pytest.raises(WindowRejectedError, match=f"went backwards: {name}$"):
        close(samples, gpu)
