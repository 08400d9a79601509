"""A model whose layers keep different tokens: what its groups hold, and that no answer depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagoda.config.schema import PagodaConfig
from pagoda.engine.core.loop import EngineCore
from pagoda.engine.core.startup import start_core
from pagoda.models.dummy import DummySpec
from pagoda.request import EngineRequest
from pagoda.sampling.params import SamplingParams
from tests.support.checkpoints import shared_checkpoint
from tests.support.recording import Recording

WINDOW, CHUNK = 16, 32
# As Gemma 3 is: of six layers one keeps all tokens.
SPEC = DummySpec(num_layers=6, sliding_window=WINDOW, max_window_layers=1, max_position_embeddings=1024)


def make_core(directory: Path, **settings) -> EngineCore:
    values = {
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "block_size": 8,
        "max_num_seqs": 4,
        "max_num_batched_tokens": CHUNK,
        "max_model_len": 600,
        "kv_cache_memory_bytes": 64 << 20,
    }
    return start_core(PagodaConfig(model=str(directory), **(values | settings)))


def run(core: EngineCore, prompts: dict[str, list[int]], max_tokens: int = 12) -> tuple[dict[str, list[int]], int]:
    """The answers, and the most blocks that were held at once."""
    outputs: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        core.add_request(EngineRequest(request_id=name, prompt_token_ids=prompt, params=params, max_tokens=max_tokens))
    most = 0
    while core.has_work:
        for news in core.step().outputs:
            assert news.error is None
            outputs[news.request_id] += news.new_token_ids
        most = max(most, core._scheduler.kv.pool.num_in_use)
    return outputs, most


@pytest.fixture(scope="module")
def directory() -> Path:
    return shared_checkpoint(SPEC)


PROMPT = [(13 * n * n + 5 * n) % 500 for n in range(480)]


def test_layers_with_a_window_hold_a_window_and_a_chunk_of_a_long_prompt(directory: Path) -> None:
    core = make_core(directory)
    assert core._scheduler.kv.groups != ()
    answers, most = run(core, {"a": PROMPT})
    # 62 blocks of the one layer of full attention; of each of five others at most a window and a chunk, and an edge.
    of_window = -(-(CHUNK + WINDOW - 1) // 8) + 1
    assert -(-(480 + 11) // 8) < most <= -(-(480 + 12) // 8) + 5 * of_window
    assert "1 of full attention and 5 of a window of 16" in core.ready.kv_equation
    # The same tokens where all is kept: a cache of one group, for sequences that do not fill the window.
    whole = make_core(directory, max_num_batched_tokens=512)
    assert run(whole, {"a": PROMPT})[0] == answers


def test_a_prefix_is_found_by_its_last_window_and_not_where_that_is_gone(directory: Path) -> None:
    core = make_core(directory)
    first, _ = run(core, {"a": PROMPT})
    before = core.stats().prefix_cache_hits
    again, _ = run(core, {"b": PROMPT})
    assert again["b"] == first["a"]
    assert core.stats().prefix_cache_hits - before == 472  # all full blocks that leave a token to compute
    # Of another prompt that shares 240 tokens, the window before token 240 is needed, which was given back while "a" ran.
    before = core.stats().prefix_cache_hits
    shared = PROMPT[:240] + PROMPT[300:340]
    expected, _ = run(make_core(directory, enable_prefix_caching=False), {"c": shared})
    assert run(core, {"c": shared})[0] == expected
    assert core.stats().prefix_cache_hits - before == 240
    assert core.stats().num_blocks_in_use == 0


def test_captured_steps_read_the_tables_of_their_groups(directory: Path) -> None:
    prompts = {"a": PROMPT[:100], "b": PROMPT[50:90], "c": PROMPT[7:20]}
    expected, _ = run(make_core(directory), prompts, max_tokens=40)
    core = make_core(directory)
    recording = Recording()
    core._executor.runner.capture_graphs(recording)
    assert run(core, prompts, max_tokens=40)[0] == expected
    assert recording.num_replayed > 30
