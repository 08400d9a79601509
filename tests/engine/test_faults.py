"""A request's fault ends that request, a step's fault its requests; and nobody else's answers change."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pagoda import faults
from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.engine.messages import EngineOutput
from pagoda.errors import ConfigError, EngineDeadError, ErrorKind, InvalidRequestError
from pagoda.request import EngineRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.scheduling.plan import NewRequest


@pytest.fixture(autouse=True)
def no_faults_left():
    yield
    faults.install(None)


def make_core(checkpoint: Path, **fields) -> EngineCore:
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 200, "threads": 1} | fields
    return start_core(PagodaConfig(model=str(checkpoint), device="cpu", dtype="float32", **values))


def run(core: EngineCore, names: list[str], max_tokens: int | None = 20) -> dict[str, tuple[list[int], EngineOutput]]:
    tokens: dict[str, list[int]] = {name: [] for name in names}
    ends: dict[str, EngineOutput] = {}
    for index, name in enumerate(names):
        prompt = [5 + (index * 31 + position * 17) % 400 for position in range(10 + 7 * index)]
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        limit = max_tokens or 200 - len(prompt)
        core.add_request(EngineRequest(request_id=name, prompt_token_ids=prompt, params=sampling, max_tokens=limit))
    while core.has_work:
        for output in core.step().outputs:
            tokens[output.request_id] += output.new_token_ids
            if output.finish_reason is not None:
                assert output.request_id not in ends
                ends[output.request_id] = output
    return {name: (tokens[name], ends[name]) for name in names}


NAMES = ["a", "b", "bad", "c", "d"]


@pytest.mark.parametrize("point", ["prepare", "sample", "sample@bad#5"])
def test_fault_of_one_request_ends_it_alone(checkpoint: Path, point: str) -> None:
    core = make_core(checkpoint)
    undisturbed = run(core, NAMES)
    fault = f"{point}=raise" if "@" in point else f"{point}@bad=raise"
    disturbed = run(make_core(checkpoint, fault_injection=fault), NAMES)
    assert disturbed["bad"][1].finish_reason is FinishReason.ERROR
    assert disturbed["bad"][1].error_kind is ErrorKind.INTERNAL
    for name in set(NAMES) - {"bad"}:
        assert disturbed[name][0] == undisturbed[name][0]
        assert disturbed[name][1].finish_reason is FinishReason.LENGTH


def test_request_that_shares_blocks_with_a_failed_one_still_gets_its_own_tokens(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    prompt = list(range(50, 90))
    sampling = SamplingParams(temperature=0.0, ignore_eos=True)
    request = EngineRequest(request_id="alone", prompt_token_ids=prompt, params=sampling, max_tokens=8)

    def answer(request_id: str) -> list[int]:
        found: list[int] = []
        while core.has_work:
            for output in core.step().outputs:
                found += output.new_token_ids if output.request_id == request_id else []
        return found

    core.add_request(request)
    alone = answer("alone")
    core = make_core(checkpoint, max_num_batched_tokens=128, fault_injection="prepare@bad=raise")
    for name in ("bad", "good"):
        core.add_request(EngineRequest(request_id=name, prompt_token_ids=prompt, params=sampling, max_tokens=8))
    assert answer("good") == alone


def test_failed_step_ends_its_requests_and_the_engine_goes_on(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    undisturbed = run(core, NAMES)
    faults.install("step#4=raise")
    disturbed = run(core, NAMES)
    assert {end.finish_reason for _, end in disturbed.values()} >= {FinishReason.ERROR}
    assert core.stats().num_blocks_in_use == 0
    again = run(core, NAMES)
    assert {name: tokens for name, (tokens, _) in again.items()} == {
        name: tokens for name, (tokens, _) in undisturbed.items()
    }


def test_no_memory_for_a_request_that_enters_is_no_memory_for_the_step(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may have been admitted with the blocks that it should fill, so the step is planned again."""
    core = make_core(checkpoint, enable_prefix_caching=True, max_num_batched_tokens=64)
    undisturbed = run(core, NAMES)
    batch = core._executor._worker.runner.batch  # type: ignore[attr-defined]
    write, calls = batch._write_request, []

    def fail_once(new: NewRequest) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise MemoryError("no memory for the tokens of a request")
        write(new)

    monkeypatch.setattr(batch, "_write_request", fail_once)
    disturbed = run(core, NAMES)
    assert len(calls) > len(NAMES)
    for name in NAMES:
        assert disturbed[name][0] == undisturbed[name][0]
        assert disturbed[name][1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("prompt", [[], [5, -1], [5, 100_000], [5] * 200])
def test_a_prompt_that_would_harm_others_is_refused_at_the_border_of_the_engine(
    checkpoint: Path, prompt: list[int]
) -> None:
    core = make_core(checkpoint)
    with pytest.raises(InvalidRequestError):
        core.add_request(EngineRequest(params=SamplingParams(), prompt_token_ids=prompt, max_tokens=1))
    assert not core.has_work


def test_failed_step_on_a_device_that_is_not_sane_is_the_end_of_the_engine(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(checkpoint)
    faults.install("step#2=raise")

    def insane() -> None:
        raise EngineDeadError("the device is lost")

    monkeypatch.setattr(core._executor, "check_health", insane)
    with pytest.raises(EngineDeadError, match=r"unusable after a failed step: the device is lost"):
        run(core, NAMES)


def test_blocks_that_an_idle_engine_still_holds_are_taken_back(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = make_core(checkpoint)
    undisturbed = run(core, NAMES)
    with monkeypatch.context() as patched:
        patched.setattr(core._scheduler.kv, "release", lambda request: None)
        run(core, NAMES)
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert re.search(r"leak in an idle engine: \d+ KV blocks", record.getMessage())
    assert core.stats().num_blocks_in_use == 0
    assert {name: tokens for name, (tokens, _) in run(core, NAMES).items()} == {
        name: tokens for name, (tokens, _) in undisturbed.items()
    }


def test_step_that_does_not_fit_is_run_in_smaller_ones_with_the_same_tokens(checkpoint: Path) -> None:
    core = make_core(checkpoint)
    undisturbed = run(core, NAMES)
    disturbed = run(make_core(checkpoint, fault_injection="step#6=oom,step#9=oom,step#30=oom"), NAMES)
    for name in NAMES:
        assert disturbed[name][0] == undisturbed[name][0]
        assert disturbed[name][1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("max_tokens", [1, 7, 20, None])
@pytest.mark.parametrize("steps", [2, 8])
def test_multi_step_plans_give_the_same_tokens_as_single_steps(
    checkpoint: Path, steps: int, max_tokens: int | None
) -> None:
    single = run(make_core(checkpoint), NAMES, max_tokens)
    # Few blocks: some plans are cut short, and some requests are preempted in between.
    several = run(make_core(checkpoint, num_scheduler_steps=steps, num_gpu_blocks_override=30), NAMES, max_tokens)
    for name in NAMES:
        assert several[name][0] == single[name][0]
        assert several[name][1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("specification", ["nowhere=raise", "step=explode", "step#x=raise", "step=sleep:long"])
def test_unknown_fault_is_refused(specification: str) -> None:
    with pytest.raises(ConfigError, match="must be POINT"):
        faults.install(specification)
