"""What drafts may lose, whatever is believed of them.

Costs and rates of acceptance are estimates, and to learn them drafts have to be tried. So every step is accounted for: what
its drafts took is compared with what the tokens that they brought would have taken without, at the price of a plain step.

    balance ▲      ╭──╮                gains, up to `_MOST_GAINED`
            │ ╭────╯  ╰─╮              a share of the time of all steps, up to `_MOST_SAVED` or what is asked for
          0 ┼─╯─────────╰╮  ╭──────
            │            ╰──╯          no drafts before it is above 0 again

So of the time without drafts at most `_SHARE` is lost, and `_MOST_SAVED` steps.
"""

from __future__ import annotations

from pagoda.scheduling.lookahead import MeasuredStep
from pagoda.scheduling.step_cost import StepCost

_SHARE = 0.01
_MOST_SAVED = 3.0  # plain steps
_MOST_GAINED = 16.0
# Times that its expected time, at most, counts of a step or pass: the machine may have been suspended.
_OUTLIER = 4.0
_EXCESS_SHARE = 0.02


class LossBudget:
    """The account of one proposer, in seconds. `cost`: of steps; `pass_cost`: of passes of the draft model."""

    def __init__(self, cost: StepCost, pass_cost: StepCost | None = None) -> None:
        self._cost = cost
        self._pass_cost = pass_cost or StepCost(cost.pace)
        self._balance = 0.0
        self._is_new = True
        self._asked = 0.0
        self._plain_seconds = 0.0  # of the last step that sampled
        # What steps without drafts take on the average, by what they typically do, which is what their cost says.
        self._excess = 1.0

    @property
    def is_open(self) -> bool:
        """Whether drafts that seem to pay may be made."""
        return self._is_new or self._balance > 0.0

    def allows(self, loss: float) -> bool:
        """Whether so much may be lost now; if not, it is saved for. At first that is what a step is known to take, times
        `_MOST_SAVED`, and anything where that is not known."""
        balance = self._balance
        if self._is_new:
            balance = _MOST_SAVED * self._cost.seconds(1) if self._cost.is_measured(1) else loss
        if balance >= loss:
            self._asked = 0.0
            return True
        self._asked = loss
        return False

    def settle(self, step: MeasuredStep) -> None:
        """Enter a step that ran; to be called before its time is taken into the costs."""
        plain_seconds = self._cost.seconds(step.num_outputs) if step.num_outputs else self._plain_seconds
        if not plain_seconds:
            return  # nothing is measured yet
        if self._is_new:
            self._balance, self._is_new = _MOST_SAVED * plain_seconds, False
        self._plain_seconds = plain_seconds
        saved = max(_MOST_SAVED * plain_seconds, self._asked)
        if self._balance < saved:
            self._balance = min(saved, self._balance + _SHARE * (step.seconds + step.seconds_unmeasured))
        lost = self._lost_by_drafting(step) + self._lost_by_verifying(step)
        self._balance = min(self._balance - lost, max(self._balance, _MOST_GAINED * plain_seconds))

    def _lost_by_drafting(self, step: MeasuredStep) -> float:
        passes = step.draft_passes
        return sum(self._taken(self._pass_cost, tokens, seconds) for tokens, seconds in passes) / self._excess

    def _lost_by_verifying(self, step: MeasuredStep) -> float:
        """The seconds that drafts took less those that their tokens would have taken one by one."""
        if not step.num_drafts:
            if step.only_decodes and self._cost.is_measured(step.num_tokens):
                ratio = self._taken(self._cost, step.num_tokens, step.seconds) / self._cost.seconds(step.num_tokens)
                self._excess += _EXCESS_SHARE * (ratio - self._excess)
            return 0.0
        if step.only_decodes:
            # By the clock and not by the costs: chosen is what these make look cheap.
            verifying = self._taken(self._cost, step.num_tokens, step.seconds) / self._excess - self._plain_seconds
        else:
            verifying = self._cost.seconds(step.num_tokens) - self._cost.seconds(step.num_tokens - step.num_drafts)
        return verifying - max(0, step.num_made - step.num_outputs) * self._plain_seconds / step.num_outputs

    @staticmethod
    def _taken(cost: StepCost, num_tokens: int, seconds: float) -> float:
        expected = cost.seconds(num_tokens)
        return min(seconds, _OUTLIER * expected) if expected else seconds
