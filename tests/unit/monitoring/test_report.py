"""A report's figures, each rule of its advice with a report that is made for it, and its page."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pagoda.benchmarking.metrics import ServiceLevel, by_request, summarize
from pagoda.benchmarking.records import RequestRecord
from pagoda.cli.report import run
from pagoda.cli.top import as_text
from pagoda.errors import ConfigError, PagodaError
from pagoda.monitoring.advice import RULES, advise
from pagoda.monitoring.figures import figures
from pagoda.monitoring.page import as_html
from pagoda.monitoring.report import goodput_while_watched, of_bench
from pagoda.monitoring.server import Server, look
from pagoda.monitoring.steps import Machine, Recording, Size, best_seen
from tests.support.rest_harness import RestHarness

LATENCY = {
    "what": "x",
    "count": 9,
    "mean": 10.0,
    "p50": 10.0,
    "p90": 20.0,
    "p99": 30.0,
    "since": "watched",
    "histogram": [[0.01, 5], [None, 4]],
}
DECODE = {
    "steps": 100,
    "share": 0.9,
    "ms": {"p50": 10.0, "p99": 12.0},
    "rows": 16.0,
    "tokens": 16.0,
    "new": 16.0,
    "roof_share": 0.8,
    "bound": "memory",
}
WELL: dict[str, Any] = {
    "kind": "server",
    "subject": "http://localhost:8080",
    "time": "now",
    "seconds": 10.0,
    "version": "1",
    "state": "ready",
    "system": {"cpu": {"usable_cores": 4}, "memory": {"total": 2**30}, "versions": {"torch": "2"}},
    "settings": {
        name: {"value": value, "default": None, "source": "default"}
        for name, value in (
            ("enable_prefix_caching", True),
            ("speculative_config", None),
            ("quantization", None),
            ("threads", 4),
        )
    },
    "not_shown": {},
    "causes": [],
    "advice": [],
    "models": [
        {
            "name": "m",
            "state": "ready",
            "limits": {
                "kv_equation": "KV cache: …",
                "max_num_seqs": 32,
                "max_num_batched_tokens": 2048,
                "dtype": "bfloat16",
            },
            "load": {
                "running": 4.0,
                "waiting": 0.0,
                "kv_usage": 0.4,
                "requests": 1.0,
                "output_tokens": 9.0,
                "prompt_tokens": 3.0,
            },
            "latencies": {name: dict(LATENCY) for name in ("ttft", "itl", "e2el", "queue", "prefill", "decode")},
            "goodput": None,
            "steps": {
                "seconds": 10.0,
                "steps": 120,
                "idle_share": 0.2,
                "preempted": 0,
                "preempted_share": 0.0,
                "most_waiting": 0,
                "blocks": {"free": 5, "in use": 3},
                "kinds": {"decode": DECODE},
                "roofline": {"flops": 1e12, "bytes": 1e10, "source": "measured", "points": [[1.0, 1e9, "decode"]]},
            },
            "prefix_cache": {
                "share": 0.5,
                "queries": 5000.0,
                "hits": 2500.0,
                "misses": {"new": 2500.0},
                "saved_seconds": 1.0,
            },
            "speculation": None,
            "size": {"parameters": 10**6, "weight_bytes": 2 * 10**6},
        }
    ],
}


def changed(**changes: Any) -> dict[str, Any]:
    """`WELL` with other values, named by their path in the model or, from `settings` on, in the report."""
    report = copy.deepcopy(WELL)
    for path, value in changes.items():
        at: Any = report if path.startswith("settings") else report["models"][0]
        *parts, last = path.split("__")
        for part in parts:
            at = at[part]
        at[last] = value
    return report


MIXED = {"steps__kinds__mixed": {**DECODE, "share": 0.7, "ms": {"p50": 80.0, "p99": 90.0}}}
ADVICE: list[tuple[str, dict[str, Any]]] = [
    ("more-kv-memory", {"steps__preempted_share": 0.12, "steps__preempted": 14}),
    ("kv-limits-batch", {"load__kv_usage": 0.95, "load__waiting": 3.0}),
    ("queue-dominates", {"latencies__queue__p90": 300.0, "latencies__ttft__p90": 400.0}),
    ("prefix-caching-off", {**MIXED, "settings__enable_prefix_caching__value": False}),
    ("prefixes-evicted", {**MIXED, "prefix_cache__misses": {"evicted": 2500.0}}),
    ("prefixes-kept-apart", {**MIXED, "prefix_cache__misses": {"other_cache_keys": 2500.0}}),
    ("prefill-stalls-decode", {**MIXED, "latencies__itl__p99": 90.0}),
    ("try-speculation", {"steps__kinds__decode__rows": 1.5, "settings__quantization__value": "int8"}),
    (
        "smaller-weights",
        {"steps__kinds__decode__rows": 1.5, "settings__speculative_config__value": {"method": "ngram"}},
    ),
    ("drafts-refused", {"speculation": {"acceptance": 0.1, "length": 1.1, "positions": [0.1]}}),
    ("draft-more", {"speculation": {"acceptance": 0.9, "length": 3.7, "positions": [0.95, 0.9]}}),
    ("decode-far-from-roof", {"steps__kinds__decode__roof_share": 0.1}),
    ("slo-missed", {"goodput": {"limits_ms": {"ttft": 10.0}, "shares": {"ttft": 0.5}, "share": 0.5}}),
]


def test_a_server_that_is_well_gets_no_advice() -> None:
    assert advise(WELL) == []


@pytest.mark.parametrize(("code", "changes"), ADVICE, ids=[code for code, _ in ADVICE])
def test_advice_with_its_evidence(code: str, changes: dict[str, Any]) -> None:
    (found,) = advise(changed(**changes))
    assert found.code == code
    assert found.seen
    assert any(re.search(r"\d|bfloat16", line) for line in found.seen)
    assert found.advice


def test_every_rule_has_a_report_that_it_answers() -> None:
    answered = {
        rule
        for _, changes in ADVICE
        for rule in RULES
        for _ in rule(changed(**changes), changed(**changes)["models"][0])
    }
    assert answered == set(RULES)


def test_an_idle_engine_gets_no_advice_on_speed() -> None:
    slow = {"steps__kinds__decode__rows": 1.5, "steps__kinds__decode__roof_share": 0.1, **MIXED}
    assert advise(changed(**slow, steps__idle_share=0.9)) == []


@pytest.mark.parametrize(("queue", "prefill", "said"), [(500.0, 50.0, "the queue:"), (5.0, 50.0, "the prefill:")])
def test_a_missed_ttft_names_what_it_is_spent_on(queue: float, prefill: float, said: str) -> None:
    goodput = {"limits_ms": {"ttft": 10.0, "tpot": 50.0}, "shares": {"ttft": 0.5, "tpot": 1.0}, "share": 0.5}
    changes = {"latencies__queue__p90": queue, "latencies__prefill__p90": prefill, "latencies__ttft__p90": 10_000.0}
    (found,) = advise(changed(goodput=goodput, **changes))
    assert found.advice.startswith(said)


def test_the_roofline_is_of_the_models_size_and_the_machine() -> None:
    size = Size(parameters=1000, weight_bytes=2000, kv_bytes_per_token=10)
    recording = Recording(seconds=2.0)
    rows = [["a", 0, 64, 0, 1], ["b", 20, 4, 3, 2]]
    for kind in (rows, rows[:1], rows[1:]):
        step = {"time": 0.0, "seconds": 0.5, "waiting": 3, "preempted": 1, "rows": kind}
        blocks = {"first": 0, "states": "..cu"}
        recording.take({"type": "trace", "steps": [step], "replica": 0, "blocks": blocks})
    mixed, prefill, decode = recording.steps
    assert [one.kind for one in recording.steps] == ["mixed", "prefill", "decode"]
    assert (mixed.tokens, mixed.context, mixed.drafts, mixed.new) == (68, 20, 3, 3)
    assert size.flops(prefill) == 2 * 1000 * 64
    assert size.bytes(decode) == 2000 + 10 * 24
    best = best_seen(recording.steps, size)
    assert best is not None
    assert best.flops == size.flops(mixed) / 0.5
    machine = Machine(flops=2 * best.flops, bytes=1e9, source="measured")
    found = recording.as_json(size, machine)
    assert found["kinds"]["mixed"]["roof_share"] == pytest.approx(0.5)
    assert found["kinds"]["mixed"]["bound"] == "compute"
    assert (found["idle_share"], found["preempted"], found["most_waiting"]) == (0.25, 3, 3)
    assert found["blocks"] == {"free": 2, "cached": 1, "in use": 1, "shared": 0}


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps what refers to something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize(
    "changes",
    [{}, *(changes for _, changes in ADVICE), {"steps": None, "limits": None, "prefix_cache": None, "latencies": {}}],
)
def test_the_page_is_whole_and_refers_to_nothing(changes: dict[str, Any]) -> None:
    report = changed(**changes)
    report["advice"] = [
        {
            "code": one.code,
            "severity": "note",
            "subject": one.subject,
            "what": one.what,
            "seen": list(one.seen),
            "advice": one.advice,
        }
        for one in advise(report)
    ]
    page = Page(as_html(report))
    assert page.references == []
    assert "script" not in page.tags


def test_names_of_models_and_settings_are_text() -> None:
    hostile = "<script>alert(1)</script>"
    report = changed(name=hostile)
    report["settings"] = {hostile: {"value": hostile, "default": None, "source": hostile}}
    text = as_html(report)
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 4
    Page(text)


def records() -> list[RequestRecord]:
    return [
        RequestRecord(
            conversation=0,
            turn=0,
            scheduled=0.0,
            sent=0.0,
            ended=1.0 + k,
            event_times=[0.1 * k, 1.0 + k],
            prompt_tokens=5,
            output_tokens=2,
        )
        for k in range(1, 11)
    ]


def ended(ttft: float | None, tpot: float | None, reason: str = "stop", cause: str | None = None) -> dict[str, Any]:
    return {"ttft": ttft, "tpot": tpot, "e2el": 1.0, "reason": reason, "cause": cause}


def test_a_request_is_good_when_it_keeps_all_limits_at_once() -> None:
    recording = Recording(seconds=10.0)
    requests = [
        ended(0.1, 0.01),
        ended(0.1, None),  # one token
        ended(0.1, 0.2),
        ended(0.9, 0.01),
        ended(0.1, 0.01, "error"),
        ended(0.1, 0.01, "abort", "deadline"),
        ended(0.1, 0.01, "abort", "client"),  # not counted: nobody waited for it
    ]
    recording.take({"type": "requests", "requests": requests})
    found = goodput_while_watched(recording, ServiceLevel({"ttft": 500.0, "tpot": 50.0}))
    assert found is not None
    assert (found["joint"], found["requests"], found["share"], found["requests_per_second"]) == (True, 6, 2 / 6, 0.2)
    assert found["shares"] == {"ttft": 3 / 6, "tpot": 3 / 6}
    assert "33.3% of requests are within" in as_html(changed(goodput=found))
    assert "of 6 that ended while it was watched" in as_html(changed(goodput=found))
    assert goodput_while_watched(recording, ServiceLevel({})) is None
    assert goodput_while_watched(Recording(), ServiceLevel({"ttft": 500.0})) is None


def test_a_report_of_a_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "kind": "serve",
        "time": "now",
        "cpu": {"name": "c"},
        "memory_bytes": 2**30,
        "versions": {"pagoda": "1"},
        "arguments": {"model": "m", "base_url": "http://h"},
        "results": summarize(records(), ServiceLevel({"ttft": 350.0})),
        "requests_ms": by_request(records()),
    }
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(content))
    assert run(["--bench", str(file), "--json", "-", "--slo", "ttft:500", "e2el:3000"]) == 0
    found = json.loads(capsys.readouterr().out)
    (model,) = found["models"]
    assert model["goodput"]["share"] == 0.2
    assert model["goodput"]["shares"] == {"ttft": 0.5, "e2el": 0.2}
    assert sum(count for _, count in model["latencies"]["ttft"]["histogram"]) == 10
    assert [one["code"] for one in found["advice"]] == ["slo-missed"]
    assert of_bench(content, ServiceLevel({}))["models"][0]["goodput"]["share"] == 0.3
    out = tmp_path / "r.html"
    assert run(["--bench", str(file), "--out", str(out)]) == 0
    Page(out.read_text())
    file.write_text("{}")
    with pytest.raises(ConfigError, match="no result of `pagoda bench serve"):
        run(["--bench", str(file)])
    with pytest.raises(ConfigError, match="--slo 'ttft'"):
        run(["--slo", "ttft"])


def test_a_key_that_does_not_show_the_metrics_is_told_so() -> None:
    with RestHarness(api_keys=("k",)) as rest:
        with pytest.raises(PagodaError, match=r"the metrics are not shown: .*; give a key that may: --api-key"):
            run(["--base-url", rest.url, "--seconds", "0.1"])
        now = look(Server(rest.url))
        text = as_text(figures(now, now), rest.url)
        assert "no figures: an API key is required" in text
        assert "running" not in text  # nobody counted
