"""What an engine's steps did on a device over a span of time, by what their cost depends on."""

from __future__ import annotations

from dataclasses import dataclass, field

from agft_ray.simulation.physics import StepWork


@dataclass(slots=True)
class WorkDone:
    """Steps run since the last `clear`; of one that is under way, the share that is done.

    A step's time and energy are not linear in its tokens, so steps with prefill are kept one by
    one. Decode steps of one batch size are (nearly) linear in the context, so that sums do.
    """

    prefill: list[tuple[StepWork, float]] = field(default_factory=list)
    """Steps with prefill, and the share of each that was run."""
    prefill_s: float = 0.0
    """How long they took."""
    prefill_j: float = 0.0
    """Energy of all GPUs meanwhile."""
    decode: dict[int, list[float]] = field(default_factory=dict)
    """By batch size: how many steps, and the tokens in the KV caches they read, summed."""
    decode_s: float = 0.0
    decode_j: float = 0.0

    @property
    def busy_s(self) -> float:
        """How long steps ran."""
        return self.prefill_s + self.decode_s

    def add(
        self, first: StepWork, steps: float, context_tokens: float, time_s: float, energy_j: float
    ) -> None:
        """A share of a step, or a series of decode steps of which this is the first.

        `context_tokens` is the sum over steps of what they read; they took so long, and so much
        energy of all GPUs.
        """
        if first.prefill_tokens:
            if self.prefill and self.prefill[-1][0] is first:
                steps += self.prefill.pop()[1]
            self.prefill.append((first, steps))
            self.prefill_s += time_s
            self.prefill_j += energy_j
            return
        sums = self.decode.get(first.decode_sequences)
        if sums is None:
            self.decode[first.decode_sequences] = [steps, context_tokens]
        else:
            sums[0] += steps
            sums[1] += context_tokens
        self.decode_s += time_s
        self.decode_j += energy_j

    def clear(self) -> None:
        """Begin anew."""
        self.prefill.clear()
        self.decode.clear()
        self.prefill_s = self.prefill_j = self.decode_s = self.decode_j = 0.0
