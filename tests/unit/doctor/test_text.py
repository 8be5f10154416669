"""What `agft-ray doctor` prints, on made-up findings; what it finds is in test_examine.py."""

from dataclasses import replace

from golden_files import assert_golden, sections

from agft_ray.doctor import text
from agft_ray.doctor.findings import Findings, GpuFindings, NodeFindings, Privileges, Versions
from agft_ray.gpu.nvml.devices import DeviceInfo
from agft_ray.gpu.probe import ClockChange, ClockProbe, EnergyCounter
from agft_ray.gpu.safety.info import LeaseInfo
from agft_ray.types import Actuator

NODE = NodeFindings(
    versions=Versions("550.54.15", "12.550.54.15", "12.4"),
    privileges=Privileges(0, True),
    kind="nvml",
    actuator=Actuator.SM_CLOCK,
    zeusd_socket="/var/run/zeusd.sock",
    zeusd_problem="zeusd does not answer on /var/run/zeusd.sock",
    lease_dir="/run/agft-ray",
    lease_problem=None,
)
H100 = DeviceInfo(
    0,
    uuid="GPU-12345678-1234-1234-1234-123456789012",
    model="NVIDIA H100 80GB HBM3",
    pci_address="0000:17:00.0",
    mig_enabled=False,
    virtualization="none",
    persistence_mode=True,
    sm_clocks_mhz=tuple(range(210, 1981, 15)),
    has_energy_counter=True,
    power_limit_w=700.0,
    default_power_limit_w=700.0,
    power_limit_range_w=(200.0, 700.0),
    compute_processes=0,
)
COUNTER = EnergyCounter("counter", 1.0, 50, 0.0021, 0.0201, 0.001)
HEALTHY = GpuFindings(H100, energy_counter=COUNTER)
LEASE = LeaseInfo(str(H100.uuid), "app#LLM r1", 4321, True, True, 4322, False, False, 0.0)
FOLLOWED = ClockChange(0.0012, 0.25, 1095, False)
NOT_SEEN = ClockChange(0.0012, None, 210, True)
TRIED = replace(HEALTHY, control_is_tried=True)


def of_gpu(**changes):
    return replace(HEALTHY, device=replace(H100, **changes))


GPUS = {
    "probed": replace(TRIED, clock_probe=ClockProbe(1095, FOLLOWED, FOLLOWED)),
    "probed while idle": replace(TRIED, clock_probe=ClockProbe(1095, NOT_SEEN, NOT_SEEN)),
    "probed while something else held the clock": replace(
        TRIED, clock_probe=ClockProbe(1095, replace(NOT_SEEN, idle=False), FOLLOWED)
    ),
    "probe refused": replace(TRIED, obstacles=("why NVML refused it",)),
    "inferred not to work": replace(HEALTHY, obstacles=("one obstacle", "another")),
    "MIG": of_gpu(mig_enabled=True, virtualization="vgpu", compute_processes=3),
    "knows no MIG": of_gpu(mig_enabled=None, virtualization=None, compute_processes=None),
    "persistence off": of_gpu(persistence_mode=False),
    "persistence unknown": of_gpu(persistence_mode=None),
    "nothing to set": of_gpu(sm_clocks_mhz=None, power_limit_w=None),
    "nothing could be read": replace(
        of_gpu(sm_clocks_mhz=None, power_limit_w=None, mig_enabled=None, problem="x"),
        energy_counter=None,
    ),
    "unequal steps, no default limit": of_gpu(
        sm_clocks_mhz=(210, 225, 255), default_power_limit_w=None, compute_processes=1
    ),
    "no UUID": GpuFindings(DeviceInfo(0), obstacles=("it does not give its UUID",)),
    "no energy counter": replace(HEALTHY, energy_counter=replace(COUNTER, source="integrated")),
    "energy counter stuck": replace(
        HEALTHY, energy_counter=replace(COUNTER, resolution_j=None, update_period_s=None)
    ),
    "energy counter slow": replace(HEALTHY, energy_counter=replace(COUNTER, update_period_s=None)),
    "lease held": replace(HEALTHY, lease=LEASE),
    "lease held elsewhere": replace(HEALTHY, lease=LEASE._replace(owner_runs=False)),
    "lease of a dead owner": replace(HEALTHY, lease=LEASE._replace(held=False)),
    "lease record damaged": replace(HEALTHY, lease=LEASE._replace(damaged=True)),
    "barred": replace(HEALTHY, barred_s=59.6),
    "remarks": replace(HEALTHY, remarks=("clocks were not probed: it is in use",)),
}


NODES = {
    "no driver": Findings(replace(NODE, versions=None), (), ("NVML is not installed",)),
    "no GPU": Findings(NODE, (), ("the driver shows no GPU to this process",)),
    "no privilege": Findings(
        replace(NODE, privileges=Privileges(1000, False)),
        (replace(HEALTHY, obstacles=("it may not set clocks",)),),
        (),
    ),
    "power limits by zeusd, and no leases": Findings(
        replace(
            NODE,
            kind="zeusd",
            actuator=Actuator.POWER_LIMIT,
            zeusd_problem=None,
            lease_problem="lease directory /x cannot be made",
        ),
        (HEALTHY, replace(HEALTHY, obstacles=("it has no limit",))),
        (),
    ),
}


def shown(findings):
    return "\n".join(text.lines(findings))


def test_the_screen():
    """First as it is where all is well, then the lines that are others elsewhere."""
    screens = {"all is well": shown(Findings(NODE, (HEALTHY,), ()))}
    usual = set(screens["all is well"].splitlines())
    others = NODES | {name: Findings(NODE, (gpu,), ()) for name, gpu in GPUS.items()}
    for name, findings in others.items():
        lines = shown(findings).splitlines()
        screens[name] = "\n".join(line for line in lines if line not in usual)
    assert_golden("doctor", sections(screens))


def test_it_fits_a_screen():
    lines = list(text.lines(Findings(NODE, (replace(HEALTHY, obstacles=("no " * 80,)),), ())))
    assert max(map(len, lines)) <= 100
    assert len(lines) <= 36
