"""How many drafts are worth their cost in a step.

With r outputs that the step has anyway, and drafts of which G are expected to be accepted, it makes r + G tokens. As many
drafts are chosen as make most tokens in a second; none where that is hardly more than without.

    tokens a second     ──────────╮╭─╮
                        plain ────╯│  ╰──╮          drafts in the order of their probability, over all rows
                              0  1  2  3  4  5
"""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.scheduling.step_cost import StepCost

# Estimates err: what promises less than this gain is left alone.
LEAST_GAIN = 1.03


def choose_counts(
    probabilities: Sequence[Sequence[float]], num_outputs: int, num_tokens: int, cost: StepCost
) -> list[int]:
    """How many drafts of each row to verify. `probabilities[i][j]`: that draft j of row i, and all before it, are right; a
    step without drafts has `num_outputs` outputs and `num_tokens` tokens."""
    candidates = [
        (value, -place, row) for row, values in enumerate(probabilities) for place, value in enumerate(values)
    ]
    candidates.sort(reverse=True)
    # What a step would cost that only decodes: a prompt's chunk is worth its time by itself.
    plain = cost.of(num_outputs)
    base = plain - cost.of(num_tokens)
    expected = float(num_outputs)
    best_rate, best = LEAST_GAIN * num_outputs / plain, 0
    for count, (value, _, _) in enumerate(candidates, start=1):
        expected += value
        rate = expected / (base + cost.of(num_tokens + count))
        if rate > best_rate:
            best_rate, best = rate, count
    counts = [0] * len(probabilities)
    for _, _, row in candidates[:best]:
        counts[row] += 1
    return counts


def may_pay(num_outputs: int, num_tokens: int, most: int, cost: StepCost) -> bool:
    """Whether drafts would pay if all of them were right, `most` at most."""
    plain = cost.of(num_outputs)
    base = plain - cost.of(num_tokens)
    least_rate = LEAST_GAIN * num_outputs / plain
    count = 1
    while count <= most:
        if (num_outputs + count) / (base + cost.of(num_tokens + count)) > least_rate:
            return True
        count *= 2
    return False
