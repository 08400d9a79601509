"""Alerts, dashboard and autoscalers ask for metrics that the server has; probes and the test's question for routes it has."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pagoda.config.schema import option_defaults
from pagoda.engine.health import EngineState
from pagoda.parallel.rank_health import RankHealth
from pagoda.serving.auth.api_keys import ApiKeys
from pagoda.serving.build import report_keys
from pagoda.serving.metrics.prometheus import Metrics
from tests.support.chart import CHART, VALUE_SETS, render, server_container
from tests.support.fake_engine import FakeEngineClient
from tests.support.rest_harness import RestHarness

FULL: dict[str, Any] = {
    "monitoring": {"monitor": "service", "rules": {"enabled": True}, "dashboard": {"enabled": True}},
    "autoscaling": {"type": "keda", "keda": {"prometheusAddress": "http://prometheus:9090"}},
}


def served_series(prefix: str) -> dict[str, set[str]]:
    """Every series that `/metrics` shows, with the names of its labels."""
    metrics = Metrics("demo", prefix)
    engine = FakeEngineClient()
    engine.ranks = [RankHealth(rank=0, host="node", pid=1, last_heartbeat=0.0, num_steps=0)]
    metrics.watch(engine)
    with tempfile.NamedTemporaryFile("w") as keys:
        keys.write("a-key\n")
        keys.flush()
        report_keys(metrics, ApiKeys(file=Path(keys.name)))
    text = metrics.render()[0].decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {sample.name: set(sample.labels) for sample in samples}


def expressions(objects: dict[str, dict[str, Any]]) -> list[str]:
    """Every PromQL expression that the chart writes."""
    found = [rule["expr"] for group in objects["PrometheusRule"]["spec"]["groups"] for rule in group["rules"]]
    found += [trigger["metadata"]["query"] for trigger in objects["ScaledObject"]["spec"]["triggers"]]
    board = json.loads(next(iter(objects["Dashboard"]["data"].values())))
    found += [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    found += [variable["query"] for variable in board["templating"]["list"]]
    return found


@pytest.mark.parametrize("prefix", ["pagoda_", "vllm:"])
def test_every_expression_reads_series_and_labels_that_the_server_has(prefix: str) -> None:
    series = served_series(prefix)
    found = expressions(render({**FULL, "engine": {"metrics_prefix": prefix}}))
    read = {name for expression in found for name in re.findall(rf"{prefix}\w+", expression)}
    assert len(read) > 20
    assert read <= series.keys()
    from_prometheus = {"namespace", "pod", "le"}
    for expression in found:
        names = set().union(*(series[name] for name in re.findall(rf"{prefix}\w+", expression)), from_prometheus)
        for selector in re.findall(r"\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*=~?", selector)) <= names, expression
        for labels in re.findall(r" by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= names, expression


def test_keys_that_cannot_be_reloaded_are_an_alert_of_a_release_with_keys() -> None:
    def alerts(values: dict[str, Any]) -> dict[str, str]:
        groups = render({**FULL, **values})["PrometheusRule"]["spec"]["groups"]
        return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}

    name = "PagodaApiKeysNotReloaded"
    keys = {"apiKeysSecret": {"name": "keys"}}
    monitoring = {**FULL["monitoring"], "apiKeySecret": {"name": "scraper"}}
    with_keys = alerts({"security": keys, "monitoring": monitoring})
    assert with_keys[name].endswith("== 0")
    assert set(re.findall(r"pagoda_\w+", with_keys[name])) <= served_series("pagoda_").keys()
    assert name not in alerts({})


def test_states_that_alerts_name_are_states_of_the_engine() -> None:
    text = json.dumps(render(FULL)["PrometheusRule"])
    states = [state for group in re.findall(r'state=~?\\"([a-z|]+)\\"', text) for state in group.split("|")]
    assert states
    assert set(states) <= set(EngineState)


def test_expressions_have_balanced_brackets_and_only_this_release_s_pods() -> None:
    objects = render(FULL)
    for expression in expressions(objects):
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
    own = [rule["expr"] for group in objects["PrometheusRule"]["spec"]["groups"] for rule in group["rules"]]
    own += [trigger["metadata"]["query"] for trigger in objects["ScaledObject"]["spec"]["triggers"]]
    for expression in own:
        assert 'namespace="tales",pod=~"story-pagoda-[a-z0-9]+-[a-z0-9]+"' in expression
    assert re.fullmatch(r"story-pagoda-[a-z0-9]+-[a-z0-9]+", "story-pagoda-7c9d8f6b5-x2x4z")


def test_bounds_of_alerts_follow_the_settings() -> None:
    def bounds(engine: dict[str, Any]) -> dict[str, str]:
        rules = render({**FULL, "engine": engine})["PrometheusRule"]["spec"]["groups"][0]["rules"]
        return {rule["alert"]: rule["expr"] for rule in rules}

    defaults = option_defaults()
    assert f"> {defaults['engine_stall_timeout_seconds'] // 2:.0f} " in bounds({})["PagodaEngineSilent"]
    assert bounds({})["PagodaRankSilent"].endswith(f"> {defaults['rank_heartbeat_timeout_seconds'] // 2:.0f}")
    slow = bounds({"engine_stall_timeout_seconds": 120, "rank_heartbeat_timeout_seconds": 60})
    assert "> 60 " in slow["PagodaEngineSilent"]
    assert slow["PagodaRankSilent"].endswith("> 30")


def test_hpa_scales_on_waiting_requests_and_kv_use() -> None:
    spec = render(VALUE_SETS["hpa"])["HorizontalPodAutoscaler"]["spec"]
    targets = {m["pods"]["metric"]["name"]: m["pods"]["target"]["averageValue"] for m in spec["metrics"]}
    assert targets == {"pagoda_num_requests_waiting": "2.5", "pagoda_kv_cache_usage_perc": "800m"}
    assert targets.keys() <= served_series("pagoda_").keys()


@pytest.mark.parametrize("values", [VALUE_SETS["hpa"], VALUE_SETS["keda"]])
def test_an_autoscaler_alone_sets_the_number_of_pods(values: dict[str, Any]) -> None:
    objects = render(values)
    assert "replicas" not in objects["Deployment"]["spec"]
    scaler = objects.get("HorizontalPodAutoscaler") or objects["ScaledObject"]
    assert scaler["spec"]["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]


def test_scaled_object_has_the_shape_that_keda_reads() -> None:
    spec = render(VALUE_SETS["keda"])["ScaledObject"]["spec"]
    assert spec["minReplicaCount"] == 1
    assert spec["maxReplicaCount"] == 8
    for trigger, threshold in zip(spec["triggers"], ("4", "0.8"), strict=True):
        assert trigger["type"] == "prometheus"
        assert trigger["metricType"] == "AverageValue"
        assert trigger["metadata"]["serverAddress"] == "http://prometheus:9090"
        assert trigger["metadata"]["threshold"] == threshold
        assert all(isinstance(value, str) for value in trigger["metadata"].values())


@pytest.mark.parametrize(
    ("kind", "endpoints"), [("ServiceMonitor", "endpoints"), ("PodMonitor", "podMetricsEndpoints")]
)
def test_monitor_scrapes_the_rest_port(kind: str, endpoints: str) -> None:
    monitor = "service" if kind == "ServiceMonitor" else "pod"
    objects = render({"monitoring": {"monitor": monitor, "labels": {"release": "prometheus"}}})
    assert objects[kind]["metadata"]["labels"]["release"] == "prometheus"
    (endpoint,) = objects[kind]["spec"][endpoints]
    assert endpoint == {"port": "http1", "path": "/metrics", "scheme": "http", "interval": "15s"}
    assert "http1" in [port["name"] for port in server_container(objects)["ports"]]


def test_alerts_have_a_severity_and_a_sentence() -> None:
    for group in render(FULL)["PrometheusRule"]["spec"]["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert "tales/story-pagoda" in rule["annotations"]["summary"]


def test_probes_follow_the_engine() -> None:
    container = server_container(render({}))
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    with RestHarness(is_ready=False) as server:

        def answers() -> dict[str, bool]:
            return {name: server.client.get(path).status_code == 200 for name, path in paths.items()}

        assert answers() == {"startup": False, "readiness": False, "liveness": True}
        server.run(server.load)
        assert answers() == {"startup": True, "readiness": True, "liveness": True}
        server.call(server.context.health.drain, "told to stop")
        assert answers() == {"startup": False, "readiness": False, "liveness": True}
        server.call(server.context.health.fail, "the engine is gone")
        assert answers() == {"startup": False, "readiness": False, "liveness": False}


def test_probes_need_no_api_key() -> None:
    container = server_container(render({}))
    paths = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    with RestHarness(api_keys=("secret",)) as server:
        assert {path: server.client.get(path).status_code for path in paths} == dict.fromkeys(paths, 200)


@pytest.mark.parametrize("monitor", ["pod", "service"])
def test_scrapes_send_the_key_of_the_secret_that_is_named(monitor: str) -> None:
    values = {
        "security": {"apiKeysSecret": {"name": "keys"}},
        "monitoring": {"monitor": monitor, "apiKeySecret": {"name": "scrapes", "key": "prometheus"}},
    }
    objects = render(values)
    spec = objects[f"{monitor.title()}Monitor"]["spec"]
    (endpoint,) = spec.get("endpoints") or spec["podMetricsEndpoints"]
    credentials = {"name": "scrapes", "key": "prometheus"}
    assert endpoint["authorization"] == {"type": "Bearer", "credentials": credentials}


def test_a_monitor_that_would_be_refused_is_not_rendered() -> None:
    values = {"security": {"apiKeysSecret": {"name": "keys"}}, "monitoring": {"monitor": "pod"}}
    with pytest.raises(helm_python.HelmError, match=r"monitoring\.apiKeySecret\.name is needed"):
        render(values)
    objects = render({**values, "engine": {"anonymous_scopes": ["read"]}})
    assert "authorization" not in objects["PodMonitor"]["spec"]["podMetricsEndpoints"][0]


def test_values_and_template_name_the_same_dashboard_label() -> None:
    labels = yaml.safe_load((CHART / "values.yaml").read_text())["monitoring"]["dashboard"]["labels"]
    assert labels.items() <= render(FULL)["Dashboard"]["metadata"]["labels"].items()
