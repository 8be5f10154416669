import csv

import pytest

from agft_ray.errors import AgftError
from agft_ray.replay.plot import plot
from agft_ray.replay.result import ReplicaStatus


def test_a_picture_of_a_time_line(tmp_path):
    with (tmp_path / "timeline.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["now_s", *ReplicaStatus.model_fields])
        writer.writeheader()
        for second in range(60):
            for replica, role, clock in (("a", "tuned", 1230), ("b", "holdout", 1800)):
                row = {"replica": replica, "role": role, "t_s": second, "now_s": second}
                row |= {"sm_clock_mhz": clock, "energy_j": clock * second / 10}
                writer.writerow(row | {"generation_tokens": 40 * second})
    plot(tmp_path, tmp_path / "out.svg")
    picture = (tmp_path / "out.svg").read_text()
    assert picture.count("#1b7f4d") >= 3
    assert picture.count("#b3471d") >= 3


def test_nothing_to_draw(tmp_path):
    with pytest.raises(AgftError, match=r"timeline\.csv"):
        plot(tmp_path, tmp_path / "out.svg")
    (tmp_path / "timeline.csv").write_text("t_s,role,replica\n")
    with pytest.raises(AgftError, match="empty"):
        plot(tmp_path, tmp_path / "out.svg")
