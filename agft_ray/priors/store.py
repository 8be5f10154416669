"""What the fleet knows: every replica's experience and state, and the priors made of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agft_ray.clock import Clock
from agft_ray.policy.experience import Experience, Prior, PriorKey
from agft_ray.policy.statistics import validate
from agft_ray.priors.merge import add

MAX_RETIRED = 64
"""Experience of replicas that are gone is kept singly up to this many, then added up."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """What a replica's tuner tells the fleet, again and again.

    Attributes:
        replica: unique id of the replica.
        deployment: what its rank is unique in, as 'application#deployment'.
        rank: the replica's rank in Ray Serve, read afresh; None while unknown.
        key: what its experience may be added to.
        experience: all it has learned so far (cumulative, so a repeated report changes nothing).
        status: figures for people, passed on as they are.
        prior_version: that of the prior it has, -1 for none; the same one is not sent again.
    """

    replica: str
    deployment: str
    rank: int | None
    key: PriorKey
    experience: Experience | None
    status: dict[str, Any] = field(default_factory=dict)
    prior_version: int = -1


@dataclass(frozen=True, slots=True)
class FleetReply:
    """What a replica learns in return.

    `order` is its place (from 0) among the deployment's live replicas by rank: holdouts are the
    first of them. `prior` is the sum of all other replicas' experience under its key; None if
    there is none, or if it is the one that the replica has (`keeps_prior`).
    """

    order: int
    live: int
    prior: Prior | None
    keeps_prior: bool = False

    def prior_after(self, held: Prior | None) -> Prior | None:
        """The prior that a replica which held this one has now."""
        return held if self.keeps_prior else self.prior


@dataclass(slots=True)
class _Member:
    report: ReplicaReport
    seen_s: float
    revision: int
    """Counts up, over all members, with every change of what one of them contributes."""
    alive: bool = True


class ExperienceStore:
    """Adds up experience exactly, each replica's once.

    A replica's report replaces its previous one, and a prior leaves out the experience of the
    replica that asks, so nothing is counted twice however often anything is sent. A replica is
    live until it has been silent for `expiry_s` or another has taken its rank; its experience
    stays. Of replicas that are gone, the oldest are added up and forgotten singly; should one of
    them come back, what it reports then is not added again.
    """

    def __init__(self, *, clock: Clock, expiry_s: float) -> None:
        self._clock = clock
        self._expiry_s = expiry_s
        self._members: dict[str, _Member] = {}
        self._folded: dict[PriorKey, tuple[Experience, int]] = {}
        self._folded_replicas: set[str] = set()
        self._revision = int(clock.now_s()) << 32
        """Begins where no earlier aggregator of this cluster has come, so that none is mistaken."""
        self._left: dict[PriorKey, int] = {}
        """The last revision in which a contribution under this key ended, or was folded."""

    def report(self, report: ReplicaReport) -> FleetReply:
        """Take a report; raises `PriorError`, and keeps the previous one, if it is malformed."""
        if report.experience is not None:
            validate(report.experience)
        now_s = self._clock.now_s()
        for member in self._members.values():
            if report.rank is not None and _slot(member.report) == _slot(report):
                member.alive = False
        if report.replica in self._folded_replicas:
            report = dataclasses.replace(report, experience=None)
        self._members[report.replica] = _Member(report, now_s, self._revision_of(report))
        self._expire(now_s)
        live = self._live(report.deployment)
        version, parts, replicas = self._contributions(report)
        keeps = bool(parts) and version == report.prior_version
        prior = None
        if parts and not keeps:
            prior = Prior(report.key, version, replicas, add(parts))
        return FleetReply(live.index(report.replica), len(live), prior, keeps)

    def _revision_of(self, report: ReplicaReport) -> int:
        """The member's last one, if it contributes what it did; else a new one."""
        before = self._members.get(report.replica)
        if before is not None and before.report.key == report.key:
            if _same(before.report.experience, report.experience):
                return before.revision
        elif before is not None:
            self._end(before.report.key)
        self._revision += 1
        return self._revision

    def _end(self, key: PriorKey) -> None:
        self._revision += 1
        self._left[key] = self._revision

    def statuses(self, deployment: str | None = None) -> list[dict[str, Any]]:
        """The last status of every known replica (of one deployment: `application#deployment`),
        with who it is and whether it is `alive` added."""
        self._expire(self._clock.now_s())
        return [
            {
                **member.report.status,
                "deployment": member.report.deployment,
                "replica": replica,
                "alive": member.alive,
            }
            for replica, member in self._members.items()
            if deployment in (None, member.report.deployment)
        ]

    def _live(self, deployment: str) -> list[str]:
        live = [
            (member.report.rank is None, member.report.rank or 0, replica)
            for replica, member in self._members.items()
            if member.alive and member.report.deployment == deployment
        ]
        return [replica for *_, replica in sorted(live)]

    def _contributions(self, report: ReplicaReport) -> tuple[int, list[Experience], int]:
        """Of all others under the key: the version, what is to be added, of how many replicas."""
        key = report.key
        members = [
            member
            for replica, member in self._members.items()
            if replica != report.replica
            and member.report.key == key
            and member.report.experience is not None
        ]
        others = [m.report.experience for m in members if m.report.experience is not None]
        replicas = len(others)
        version = max([self._left.get(key, 0), *(member.revision for member in members)])
        if key in self._folded:
            experience, count = self._folded[key]
            others.append(experience)
            replicas += count
        return version, others, replicas

    def _expire(self, now_s: float) -> None:
        for member in self._members.values():
            member.alive = member.alive and now_s - member.seen_s <= self._expiry_s
        gone = sorted(
            (member.seen_s, replica)
            for replica, member in self._members.items()
            if not member.alive
        )
        for _, replica in gone[: max(0, len(gone) - MAX_RETIRED)]:
            self._fold(self._members.pop(replica).report)

    def _fold(self, report: ReplicaReport) -> None:
        if report.experience is None:
            return
        self._folded_replicas.add(report.replica)
        self._end(report.key)
        if report.key in self._folded:
            experience, count = self._folded[report.key]
            self._folded[report.key] = (add([experience, report.experience]), count + 1)
        else:
            self._folded[report.key] = (report.experience, 1)


def _same(a: Experience | None, b: Experience | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.arms_mhz == b.arms_mhz and all(
        np.array_equal(x, y)
        for x, y in ((a.counts, b.counts), (a.grams, b.grams), (a.responses, b.responses))
    )


def _slot(report: ReplicaReport) -> tuple[str, int | None]:
    return report.deployment, report.rank
