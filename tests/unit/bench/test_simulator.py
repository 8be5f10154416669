from agft_ray.cli.app import main


def test_the_bench_prints_both_policies_with_what_they_depend_on(capsys):
    assert main(["bench", "simulator", "--duration", "20", "--seed", "3"]) == 0
    conditions, fixed, agft = capsys.readouterr().out.splitlines()
    for condition in ("1 requests/s", "20 s", "seed 3", "numpy"):
        assert condition in conditions
    for line, name in ((fixed, "fixed:1230"), (agft, "agft")):
        assert line.startswith(name)
        assert float(line.split("ratio")[1]) > 0


def test_a_rate_that_is_no_rate_is_refused(capsys):
    assert main(["bench", "simulator", "--rate", "0"]) == 2
    assert "rate_per_s: " in capsys.readouterr().err
