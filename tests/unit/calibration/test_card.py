import pytest

from agft_ray.calibration.card import Card, kv_blocks, load_card, own_base
from agft_ray.calibration.card_model import ModelFacts
from agft_ray.cli.app import main
from agft_ray.errors import ConfigError
from agft_ray.simulation.profiles import load_gpu_profile

LLAMA = "llama-3.1-8b"
PRO_6000 = load_gpu_profile("rtx_pro_6000")
H100 = load_gpu_profile("h100_sxm_80gb")
RTX_4090 = Card(
    product="NVIDIA GeForce RTX 4090",
    memory_mib=24564,
    cap_w=450.0,
    min_sm_clock_mhz=210,
    max_sm_clock_mhz=3105,
    sm_clock_step_mhz=15,
    host_ms=1.0,
)
KEEP_BUT_HOST = ["product", "clocks", "cap_w", "kv_blocks"]
GEMMA = ModelFacts(layers=42, weights_bytes=18_480_000_000, kv_bytes_per_token=344_064)


def problems(*arguments, **options):
    with pytest.raises(ConfigError) as caught:
        own_base(*arguments, **{"measures_host": False} | options)
    return list(caught.value.problems)


def test_nothing_of_the_base_card_is_inherited_silently():
    found = problems(PRO_6000, LLAMA, Card(), [])
    assert [problem.partition(":")[0] for problem in found] == [
        "product",
        "clocks",
        "cap_w",
        "kv_blocks",
        "host_ms",
    ]
    assert "would be rtx_pro_6000's (600), and is not measured" in found[2]
    assert "--keep cap_w" in found[2]
    assert [p[:8] for p in problems(PRO_6000, LLAMA, Card(), ["product", "clocks", "cap_w"])] == [
        "kv_block",
        "host_ms:",
    ]
    own = own_base(PRO_6000, LLAMA, Card(), KEEP_BUT_HOST, measures_host=True)
    assert own.profile.models[LLAMA] == PRO_6000.models[LLAMA]


def test_a_stated_card():
    own = own_base(PRO_6000, LLAMA, RTX_4090, [], measures_host=False)
    profile = own.profile
    assert profile.product == "NVIDIA GeForce RTX 4090"
    assert (profile.min_sm_clock_mhz, profile.max_sm_clock_mhz) == (210, 3105)
    assert profile.power.cap_w == 450.0
    # 0.9 x 24,564 MiB - 15,317 MiB of weights - 1,536 MiB, in blocks of 2 MiB.
    assert profile.models[LLAMA].kv_blocks == 2627
    assert own.notes[f"models.{LLAMA}.kv_blocks"].startswith("derived: 0.9 x 24564 MiB")
    shares = [p.power.knee_sm_clock_mhz / p.max_sm_clock_mhz for p in (profile, PRO_6000)]
    assert shares[0] == pytest.approx(shares[1], abs=0.005)
    assert "not measured" in own.notes["power.knee_sm_clock_mhz"]
    assert not {"power.cap_w", f"models.{LLAMA}.kv_blocks"} & set(profile.ranges)


@pytest.mark.parametrize(
    ("name", "model", "memory_mib"),
    [
        ("rtx_pro_6000", LLAMA, 97887),
        ("rtx_a6000", LLAMA, 49140),
        ("h100_sxm_80gb", LLAMA, 81559),
        ("h100_sxm_80gb", "llama-3.1-70b-tp4", 81559),
    ],
)
def test_kv_blocks_that_follow_from_memory_are_the_profiles(name, model, memory_mib):
    known = load_gpu_profile(name).models[model]
    found = kv_blocks(
        memory_mib,
        tensor_parallel=known.tensor_parallel,
        weights_bytes=known.weights_bytes,
        kv_bytes_per_token=known.kv_bytes_per_token,
    )
    assert found == pytest.approx(known.kv_blocks, rel=0.025)


def test_kept_numbers_are_marked():
    own = own_base(
        PRO_6000, LLAMA, RTX_4090.model_copy(update={"cap_w": None}), ["cap_w"], measures_host=False
    )
    assert own.profile.power.cap_w == 600
    assert own.notes["power.cap_w"] == "kept from rtx_pro_6000 (--keep), not measured"
    everything = own_base(PRO_6000, LLAMA, Card(cap_w=500.0), ["all"], measures_host=False)
    assert everything.profile.power.cap_w == 500
    assert everything.notes["power.cap_w"] == "stated (--card)"
    assert everything.notes["product"].startswith("kept")


@pytest.mark.parametrize(
    ("card", "keep", "problem"),
    [
        (Card(max_sm_clock_mhz=3000), ["all"], "min_sm_clock_mhz, sm_clock_step_mhz: missing"),
        (Card(idle_sm_clock_mhz=300), ["all"], "idle_sm_clock_mhz: needs min_"),
        (Card(memory_mib=9, kv_cache_tokens=9), ["all"], "memory_mib and kv_cache_tokens: "),
        (RTX_4090, ["cap_w"], "--keep cap_w: the --card file states it"),
        (Card(memory_mib=16000), ["all"], "memory_mib: 16000 on each of 1 GPUs leaves no room"),
        (Card(model=GEMMA), ["all"], "model.layers: 42 is not rtx_pro_6000's 32"),
    ],
)
def test_crossed_facts(card, keep, problem):
    assert any(found.startswith(problem) for found in problems(PRO_6000, LLAMA, card, keep))


def test_a_model_that_the_base_lacks():
    (unknown,) = problems(H100, "gemma-2-9b", Card(), ["all"])
    assert "'gemma-2-9b' is none of h100_sxm_80gb's" in unknown
    assert "--card" in unknown
    assert any(
        found.startswith("--keep kv_blocks: h100_sxm_80gb has none for gemma-2-9b")
        for found in problems(H100, "gemma-2-9b", Card(model=GEMMA), ["kv_blocks"])
    )
    card = Card(model=GEMMA, memory_mib=81559)
    own = own_base(H100, "gemma-2-9b", card, ["all"], measures_host=False)
    model, like = own.profile.models["gemma-2-9b"], H100.models[LLAMA]
    assert (model.layers, model.kv_bytes_per_token) == (42, 344_064)
    assert model.weights_ms / like.weights_ms == pytest.approx(
        GEMMA.weights_bytes / like.weights_bytes, rel=1e-3
    )
    assert model.attention.decode_context_us == pytest.approx(
        2 * like.attention.decode_context_us, rel=1e-3
    )
    assert own.notes["models.gemma-2-9b.weights_ms"] == (
        "scaled from llama-3.1-8b of h100_sxm_80gb, not measured"
    )
    assert model.kv_blocks < like.kv_blocks / 2


def test_a_group_begins_as_the_bases_group_and_one_gpu_has_no_all_reduces():
    facts = ModelFacts(
        layers=80, weights_bytes=145_000_000_000, kv_bytes_per_token=327_680, tensor_parallel=8
    )
    card = Card(memory_mib=81559, model=facts)
    group = own_base(H100, "qwen-72b-tp8", card, ["all"], measures_host=True).profile
    assert group.models["qwen-72b-tp8"].all_reduce_ms == 0.6
    assert group.models["qwen-72b-tp8"].weights_ms == pytest.approx(
        14.15 * 145 / 141.1 / 2, rel=0.01
    )
    # 80 layers and KV bytes as Llama's: the same model on twice the GPUs.
    like, eight = H100.models["llama-3.1-70b-tp4"], group.models["qwen-72b-tp8"]
    assert eight.attention.prefill_pair_us == pytest.approx(like.attention.prefill_pair_us / 2)
    assert eight.all_reduce_token_ms == pytest.approx(like.all_reduce_token_ms * 7 / 6, rel=1e-3)
    alone = Card(memory_mib=81559, model=GEMMA)
    one = own_base(H100, "gemma", alone, ["all"], measures_host=True).profile.models["gemma"]
    assert (one.all_reduce_ms, one.spinning_activity) == (0.0, 0.0)


def test_the_file_of_a_card(tmp_path):
    path = tmp_path / "card.yaml"
    path.write_text("product: Mine\nmemory_gb: 24\ncap_w: -1\n")
    with pytest.raises(ConfigError) as caught:
        load_card(path)
    assert "memory_gb: unknown setting" in str(caught.value)
    assert "cap_w" in str(caught.value)


STEPS = "sm_clock_mhz,power_w,step_ms,batch,context_tokens\n" + "".join(
    f"{clock},{100 + clock / 10},{20 + 9000 / clock + batch / 8},{batch},{400 * batch}\n"
    for clock in (900, 1500, 2100, 2700)
    for batch in (1, 8, 32)
)


def test_command_for_a_strangers_card(tmp_path, capsys):
    pytest.importorskip("scipy", reason="scipy comes with the extra 'calibrate'")
    file, out, card = tmp_path / "steps.csv", tmp_path / "mine.yaml", tmp_path / "card.yaml"
    file.write_text(STEPS)
    command = ["calibrate", str(file), "--base", "rtx_pro_6000", "--model", LLAMA]
    assert main([*command, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "5 problems" in error
    assert "kv_blocks: would be rtx_pro_6000's" in error
    assert not out.exists()

    facts = RTX_4090.model_dump(exclude_none=True, exclude={"memory_share"})
    card.write_text("".join(f"{name}: {value}\n" for name, value in facts.items()))
    assert main([*command, "--card", str(card), "--out", str(out)]) == 0
    assert "numbers are rtx_pro_6000's, not measured: marked in" in capsys.readouterr().out
    assert load_gpu_profile(out).models[LLAMA].kv_blocks == 2627
    lines = dict(line.strip().split(":", 1) for line in out.read_text().splitlines()[2:])
    assert lines["cap_w"].endswith("450.0  # stated (--card)")
    assert lines["kv_blocks"].endswith("less weights and activations")
    assert "from rtx_pro_6000, not measured" in lines["zero_power_c"]

    assert main([*command, "--check"]) == 0
    text = capsys.readouterr().out
    assert text.count("power_w ") == 13
    assert "step_ms      mean absolute" in text


LOADS = "sm_mhz,rps,input_len,output_len,power_w,ttft_p99_s,fan\n" + "".join(
    f"{clock},{rate},200,20,{watts},.1,1\n"
    for clock, rate, watts in ((900, 1, 150), (1500, 1, 200), (900, 2, 160), (1500, 2, 220))
)


def test_command_for_a_load_test(tmp_path, capsys):
    pytest.importorskip("scipy", reason="scipy comes with the extra 'calibrate'")
    file, out = tmp_path / "loads.csv", tmp_path / "mine.yaml"
    file.write_text(LOADS)
    command = ["calibrate", str(file), "--base", "rtx_a6000", "--model", LLAMA, "--requests", "20"]
    assert main([*command, "--check"]) == 0
    text = capsys.readouterr().out
    assert "900 MHz, 1/s, 200+20 tokens" in text
    assert "2/s, 900 against 1500 MHz" in text
    assert "columns not used: fan" in text

    keep = ["--keep", "product", "--keep", "clocks", "--keep", "cap_w", "--keep", "kv_blocks"]
    assert main([*command, *keep, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert "fit 1: power_w" in shown.err
    assert "numbers that the load test determines" in shown.out
    assert load_gpu_profile(out).name == "mine"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "--out: required"),
        (["--check", "--out", "mine.yaml"], "is not written with --check"),
        (["--check", "--keep", "all"], "--keep: --check keeps all"),
        (["--check", "--requests", "3"], "--requests: 3 must be at least 20"),
    ],
)
def test_crossed_options(tmp_path, capsys, options, problem):
    (tmp_path / "loads.csv").write_text(LOADS)
    command = ["calibrate", str(tmp_path / "loads.csv"), "--base", "rtx_a6000", "--model", LLAMA]
    assert main([*command, *options]) == 2
    assert problem in capsys.readouterr().err
