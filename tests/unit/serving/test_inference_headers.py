from __future__ import annotations

import pytest

from pagoda.errors import InvalidRequestError
from pagoda.serving.inference_headers import NO_HEADERS, InferenceHeaders, read_headers

OBJECTIVES = {"chat": 10, "batch": -5}


def read(**headers: str) -> InferenceHeaders:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return read_headers(named.get, OBJECTIVES)


def test_names_of_llm_d_and_their_older_ones_mean_the_same() -> None:
    expected = InferenceHeaders(fairness_id="team", priority=-10, model="qwen", ttft_slo=0.25, tpot_slo=0.03)
    assert expected == read(
        x_llm_d_inference_fairness_id="team",
        x_llm_d_inference_objective="chat",
        x_llm_d_model_name_rewrite="qwen",
        x_llm_d_slo_ttft_ms="250",
        x_llm_d_slo_tpot_ms=" 30 ",
    )
    assert expected == read(
        x_gateway_inference_fairness_id="team",
        x_gateway_inference_objective="chat",
        x_gateway_model_name_rewrite="qwen",
        x_slo_ttft_ms="250",
        x_slo_tpot_ms="30",
    )
    assert read(x_llm_d_slo_ttft_ms="1", x_slo_ttft_ms="2").ttft_slo == 0.001


def test_an_empty_value_is_as_good_as_none_and_an_unknown_objective_has_priority_0() -> None:
    assert read() == read(x_llm_d_slo_ttft_ms="", x_llm_d_inference_fairness_id=" ") == NO_HEADERS
    assert read(x_llm_d_inference_objective="unknown").priority == 0
    assert read(x_llm_d_inference_objective="batch").priority == 5  # lower is served first


@pytest.mark.parametrize("value", ["-1", "0", "1.5", "soon", "9" * 30, "٣"])
def test_a_time_that_is_none_is_refused_by_name(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="x-llm-d-slo-ttft-ms must be a whole number of milliseconds"):
        read(x_llm_d_slo_ttft_ms=value)


def test_an_id_has_a_bound() -> None:
    with pytest.raises(InvalidRequestError, match="x-llm-d-inference-fairness-id may have 256 characters, got 257"):
        read(x_llm_d_inference_fairness_id="a" * 257)
