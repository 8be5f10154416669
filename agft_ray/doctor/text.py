"""The doctor's findings as plain text, a screen for each GPU."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence

from agft_ray.doctor.findings import Findings, GpuFindings, NodeFindings
from agft_ray.gpu.nvml.devices import DeviceInfo
from agft_ray.gpu.probe import SETTLE_LIMIT_S, ClockChange, EnergyCounter
from agft_ray.gpu.safety.info import LeaseInfo
from agft_ray.types import Actuator

WIDTH = 100
LABEL_WIDTH = 15

WITHOUT_GPU = (
    "`mode: observe` and `mode: control` on a real GPU need a driver and a GPU that this process "
    "can see; the simulated GPU (`gpu: {kind: simulated}`) needs neither."
)
WAYS = (
    "Three ways to be allowed to set clocks, or to need no permission:",
    "  1. run the replicas as root, in a container with CAP_SYS_ADMIN as well (`--cap-add "
    "SYS_ADMIN`), with `gpu: {kind: nvml}`",
    "  2. run the Zeus daemon (zeusd) as root with a Unix socket that this user may open, and use "
    "`gpu: {kind: zeusd}`",
    "  3. `mode: observe` measures and recommends, sets nothing and needs nothing",
    "Where the GPU itself cannot lock clocks, `actuator: power_limit` is the way.",
)


def lines(findings: Findings) -> Iterator[str]:
    """What to print, line by line."""
    yield from _node(findings.node)
    for gpu in findings.gpus:
        yield ""
        yield f"GPU {gpu.device.index}: {gpu.device.model or 'unknown model'}"
        for label, text in _rows(findings.node, gpu):
            yield from _row(label, text)
    for problem in findings.problems:
        yield from ("", *_wrapped(f"PROBLEM: {problem}"))
    if findings.node.versions is None or not findings.gpus:
        yield from _wrapped(WITHOUT_GPU)
    yield from ("", *(line for way in WAYS for line in _wrapped(way, "     ")))
    yield ""
    yield _verdict(findings)


def _wrapped(text: str, indent: str = "") -> Sequence[str]:
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _row(label: str, text: str) -> Sequence[str]:
    indent = " " * (LABEL_WIDTH + 2)
    return _wrapped(f"  {label:<{LABEL_WIDTH}}{text}", indent)


def _node(node: NodeFindings) -> Iterator[str]:
    if node.versions is not None:
        versions = node.versions
        yield f"Driver {versions.driver}, NVML {versions.nvml}, CUDA up to {versions.cuda}"
    has = "with" if node.privileges.cap_sys_admin else "without"
    yield f"This process: uid {node.privileges.uid}, {has} CAP_SYS_ADMIN"
    yield from _wrapped(node.zeusd_problem or f"zeusd on {node.zeusd_socket}: gpu-control is on")
    yield from _wrapped(f"Leases: {node.lease_problem or node.lease_dir}")


def _verdict(findings: Findings) -> str:
    settings = f"gpu: {{kind: {findings.node.kind}, actuator: {findings.node.actuator}}}"
    works = "would work" if findings.can_control else "would NOT work"
    share = sum(gpu.can_control for gpu in findings.gpus)
    return f"`mode: control` with `{settings}` {works} ({share} of {len(findings.gpus)} GPUs)."


def _rows(node: NodeFindings, gpu: GpuFindings) -> Iterator[tuple[str, str]]:
    device = gpu.device
    if device.uuid is None:
        yield from (("Control", f"NO: {obstacle}") for obstacle in gpu.obstacles)
        return
    yield "UUID", f"{device.uuid}, PCI {device.pci_address or 'unknown'}"
    yield "SM clocks", _sm_clocks(device)
    yield "Power limit", _power_limit(gpu)
    yield "Persistence", _persistence(device)
    yield "Sharing", _sharing(gpu)
    yield "Energy counter", _energy_counter(gpu.energy_counter)
    yield from _probe(gpu)
    yield "Lease", _lease(gpu.lease, gpu.barred_s)
    yield "Control", _control(node, gpu)
    yield from (("", obstacle) for obstacle in gpu.obstacles)
    yield from (("Note", remark) for remark in gpu.remarks)


def _sm_clocks(device: DeviceInfo) -> str:
    clocks_mhz = device.sm_clocks_mhz
    if not clocks_mhz:
        return "could not be read" if device.problem else "none listed: they cannot be locked"
    steps = sorted({high - low for low, high in itertools.pairwise(clocks_mhz)})
    apart = f", {steps[0]}{f'..{steps[-1]}' if steps[1:] else ''} MHz apart" if steps else ""
    return f"{clocks_mhz[0]}..{clocks_mhz[-1]} MHz, {len(clocks_mhz)} of them{apart}"


def _power_limit(gpu: GpuFindings) -> str:
    range_w = gpu.device.power_limit_range_w
    if gpu.device.power_limit_w is None or range_w is None:
        return "could not be read" if gpu.device.problem else "none that can be set"
    default = (
        ""
        if gpu.device.default_power_limit_w is None
        else f", default {gpu.device.default_power_limit_w:g} W"
    )
    return f"{gpu.device.power_limit_w:g} W{default}, may be {range_w[0]:g}..{range_w[1]:g} W"


def _persistence(device: DeviceInfo) -> str:
    if device.persistence_mode is None:
        return "unknown"
    return (
        "on"
        if device.persistence_mode
        else "OFF: the driver may drop a lock when the last process closes the GPU; run "
        "nvidia-persistenced"
    )


def _sharing(gpu: GpuFindings) -> str:
    absent = "MIG unknown" if gpu.device.problem else "no MIG"
    mig = {True: "MIG ON", False: "MIG off", None: absent}[gpu.device.mig_enabled]
    virtual = gpu.device.virtualization or "unknown"
    count = gpu.device.compute_processes
    if count is None:
        return f"{mig}, virtualization {virtual}, number of compute processes unknown"
    many = ": all of them would get the same clock" if count > 1 else ""
    plural = "" if count == 1 else "es"
    return f"{mig}, virtualization {virtual}, {count} compute process{plural}{many}"


def _energy_counter(counter: EnergyCounter | None) -> str:
    if counter is None:
        return "unknown: the GPU could not be read"
    if counter.source != "counter":
        return "NONE: energy is integrated from polled power, which is less exact"
    if counter.resolution_j is None:
        return (
            f"there, but it did NOT MOVE in {counter.watched_s:.1f} s, though an idle GPU draws "
            "power as well: do not trust it"
        )
    step = f"in steps of {counter.resolution_j * 1e3:g} mJ"
    if counter.update_period_s is None:
        return f"changed once in {counter.watched_s:.1f} s, {step}"
    return (
        f"updated every {_ms(counter.update_period_s)} (median; {counter.changes} changes in "
        f"{counter.watched_s:.1f} s, looked at every {_ms(counter.poll_s)}), {step}"
    )


def _probe(gpu: GpuFindings) -> Iterator[tuple[str, str]]:
    probe = gpu.clock_probe
    if probe is None:
        yield "Lock, reset", "not measured (--probe-clocks does, where nothing stands in its way)"
        return
    yield "Lock", f"at {probe.arm_mhz} MHz: {_change(probe.lock)}"
    yield "Reset", _change(probe.reset)


def _change(change: ClockChange) -> str:
    call = f"the call took {_ms(change.call_s)}"
    if change.settle_s is not None:
        return f"{call}, the clock was there after {_ms(change.settle_s)}"
    hidden = (
        "the GPU is idle, which hides it: try again under load"
        if change.idle
        else "something else holds it: heat, a power cap, or the driver took another clock"
    )
    return (
        f"{call}; the clock was not seen to follow within {SETTLE_LIMIT_S:g} s, it is "
        f"{change.sm_clock_mhz} MHz ({hidden})"
    )


def _lease(lease: LeaseInfo | None, barred_s: float) -> str:
    barred = f"; barred for {barred_s:.0f} s by `agft-ray reset --force`" if barred_s else ""
    return f"{'free' if lease is None else _holder(lease)}{barred}"


def _holder(lease: LeaseInfo) -> str:
    way_out = f"`agft-ray reset {lease.uuid}` resets the clocks"
    if lease.damaged:
        return f"the record is damaged; {way_out}"
    who = f"PID {lease.pid} ({lease.owner})"
    if not lease.held:
        return f"left by {who}, which died; {way_out}"
    seen = "" if lease.owner_runs else ", which is not seen from here (another container, or dead)"
    return f"held by {who}{seen}, guard PID {lease.guard_pid}; others have to wait"


def _control(node: NodeFindings, gpu: GpuFindings) -> str:
    what = "clocks" if node.actuator is Actuator.SM_CLOCK else "the power limit"
    if gpu.control_is_tried:
        return f"{what} can be set: tried just now" if gpu.can_control else "NO, as just tried:"
    if not gpu.can_control:
        return "NO (inferred, nothing was set to find out):"
    basis = "zeusd's answers" if node.kind == "zeusd" else "uid and capabilities"
    return f"{what} should be settable, inferred from {basis}; --probe-clocks tries it"


def _ms(time_s: float) -> str:
    return f"{time_s * 1e3:.3g} ms"
