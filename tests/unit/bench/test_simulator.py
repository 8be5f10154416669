from agft_ray.cli.app import main


def test_the_bench_prints_every_kind_of_policy_and_the_fleet_with_what_they_depend_on(capsys):
    short = ["--duration", "20", "--fleet-duration", "10", "--workers", "2", "--seed", "3"]
    assert main(["bench", "simulator", *short]) == 0
    conditions, *singles, one, other = capsys.readouterr().out.splitlines()
    for condition in ("1 requests/s", "20 s", "seed 3", "numpy"):
        assert condition in conditions
    for line, name in zip(singles, ("fixed:1230", "pair:1470/1230", "volta", "agft"), strict=True):
        assert line.startswith(name)
        assert float(line.split("ratio")[1]) > 0
    for line, name in ((one, "fixed:1230"), (other, "volta")):
        assert line.startswith(f"16 x {name}")
        assert "in 2 processes" in line
        assert float(line.split("ratio")[1].split()[0]) > 0


def test_a_rate_that_is_no_rate_is_refused(capsys):
    assert main(["bench", "simulator", "--rate", "0"]) == 2
    assert "rate_per_s: " in capsys.readouterr().err
