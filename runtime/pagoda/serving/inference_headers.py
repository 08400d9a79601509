"""What a gateway, such as llm-d's, says of a request beside its body: headers of REST, metadata of gRPC, by llm-d's names.

    x-llm-d-inference-fairness-id     whose turn it is, within the share of the caller's API key
    x-llm-d-inference-objective       the name of an objective, whose priority `inference_objectives` has
    x-llm-d-model-name-rewrite        the model to ask, in place of the one in the body
    x-llm-d-slo-ttft-ms, -tpot-ms     wanted: time to the first token, and for each further one

Their older names, `x-gateway-…` and `x-slo-…`, mean the same. An empty value is as good as none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from pagoda.errors import InvalidRequestError, shown

MAX_ID_CHARACTERS = 256
MAX_MILLISECONDS = 7 * 24 * 3600 * 1000
MILLISECONDS = 1000

FAIRNESS_ID = ("x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id")
OBJECTIVE = ("x-llm-d-inference-objective", "x-gateway-inference-objective")
MODEL = ("x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite")
TTFT = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
NAMES = frozenset(name for names in (FAIRNESS_ID, OBJECTIVE, MODEL, TTFT, TPOT) for name in names)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceHeaders:
    """`priority`: as in a request's record, lower is served first. `model`: None for the body's. SLOs in seconds."""

    fairness_id: str = ""
    priority: int = 0
    model: str | None = None
    ttft_slo: float | None = None
    tpot_slo: float | None = None


NO_HEADERS = InferenceHeaders()

inference_headers_var: ContextVar[InferenceHeaders] = ContextVar("pagoda_inference_headers", default=NO_HEADERS)
"""Those of the request that the current task serves. Set where it is admitted, and read where its model is looked up and its
job starts, so that no route in between can forget them.
"""


def read_headers(get: Callable[[str], str | None], objectives: Mapping[str, int]) -> InferenceHeaders:
    """The headers of a request. `get`: the value of one by its name. `objectives`: priorities, higher is served first.

    An objective that is not known has priority 0, as where a cluster has no such InferenceObjective. Raises
    `InvalidRequestError` for a value that cannot be.
    """

    def value_of(names: tuple[str, str]) -> tuple[str, str]:
        for name in names:
            if value := (get(name) or "").strip():
                if len(value) > MAX_ID_CHARACTERS:
                    raise InvalidRequestError(
                        f"{name} may have {MAX_ID_CHARACTERS} characters, got {len(value)}: {shown(value)}", name
                    )
                return name, value
        return names[0], ""

    return InferenceHeaders(
        fairness_id=value_of(FAIRNESS_ID)[1],
        priority=-objectives.get(value_of(OBJECTIVE)[1], 0),
        model=value_of(MODEL)[1] or None,
        ttft_slo=_seconds(*value_of(TTFT)),
        tpot_slo=_seconds(*value_of(TPOT)),
    )


def _seconds(name: str, value: str) -> float | None:
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and 0 < int(value) <= MAX_MILLISECONDS):
        raise InvalidRequestError(
            f"{name} must be a whole number of milliseconds from 1 to {MAX_MILLISECONDS}, got {shown(value)}", name
        )
    return int(value) / MILLISECONDS
