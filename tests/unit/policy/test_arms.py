from agft_ray.policy.arms import at_or_below, grid, nearest, refined

ARMS = tuple(range(210, 2101, 15))


def test_grid_steps_down_from_the_top_and_ends_with_the_lowest():
    assert grid(ARMS, 90) == [*range(210, 2101, 90)]
    assert grid([210, 300, 1000], 90) == [210, 300, 1000]


def test_grid_is_snapped_to_supported_clocks():
    irregular = [345, 352, 1005, 1410, 1417, 1980]
    assert set(grid(irregular, 90)) <= set(irregular)
    assert grid([500], 90) == [500]
    assert grid([], 90) == []


def test_refined_uses_the_step_of_the_gpu_within_the_span():
    assert refined(ARMS, 1230, 150) == [*range(1080, 1381, 15)]
    assert refined(ARMS, 2100, 150) == [*range(1950, 2101, 15)]


def test_snapping():
    assert nearest(ARMS, 1237.4) == 1230
    assert nearest(ARMS, 1237.5) == 1245
    assert nearest(ARMS, 9999) == 2100
    assert nearest(ARMS, 0) == 210
    assert at_or_below(ARMS, 1244) == 1230
    assert at_or_below(ARMS, 100) == 210
