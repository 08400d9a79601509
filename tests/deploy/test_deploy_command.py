"""`pagoda deploy` against an API server on loopback: what it applies, what it says, and what it makes of trouble."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pagoda.cli import deploy
from pagoda.cli.main import main
from pagoda.errors import PagodaError
from tests.support.fake_cluster import FakeCluster, Scene, pod, ready_conditions, running_pod, status
from tests.support.kserve_objects import CRDS_VARIABLE, REPOSITORY, build_model, crd_errors, crds
from tests.support.kubernetes_objects import validate
from tests.support.rest_harness import RestHarness
from tests.support.virtual_time import Clock

BLOCKED: list[tuple[str, dict[str, Any], str]] = [
    (
        "image",
        pod(container={"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}),
        "the image pagoda:0.1.0 cannot be pulled: no such tag",
    ),
    (
        "secret",
        pod(
            container={
                "state": {"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "k" not found'}}
            }
        ),
        'the container kserve-container cannot be made: secret "k" not found',
    ),
    (
        "crash",
        pod(
            container={
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 2, "reason": "Error"}},
                "restartCount": 3,
            }
        ),
        "the container kserve-container ended with exit status 2\nlast lines of its log:\nfirst line\nlast line",
    ),
    (
        "memory",
        pod(
            container={
                "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
            }
        ),
        "needed more memory than its limit and was killed: give it more (--memory)",
    ),
    (
        "storage",
        pod(
            initContainerStatuses=[
                {"name": "storage-initializer", "state": {"terminated": {"exitCode": 1, "reason": "Error"}}}
            ]
        ),
        "the container storage-initializer ended with exit status 1\nlast lines of its log:\nfirst line",
    ),
]


def unschedulable(message: str) -> dict[str, Any]:
    return pod(conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}])


def ready_cluster(server: RestHarness) -> FakeCluster:
    """A cluster in which all is ready from the start."""
    return FakeCluster([Scene(ready_conditions(), [running_pod(is_ready=True)])], pod_port=server.port)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path, clock: Clock) -> Callable[..., int]:
    """The command, for which time passes while it sleeps only."""

    def call(cluster: FakeCluster, *arguments: str, namespace: str | None = "tales") -> int:
        kubeconfig = cluster.write_kubeconfig(tmp_path / "kubeconfig", namespace)
        return deploy.run([f"--kubeconfig={kubeconfig}", *arguments], clock.advance, clock)

    return call


def test_it_applies_waits_with_each_stage_and_asks(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with RestHarness(is_ready=False) as server:
        scenes = [
            Scene([{"type": "PredictorReady", "status": "False", "message": "waiting for the webhook"}]),
            Scene(pods=[unschedulable("0/3 nodes are available")]),
            Scene(pods=[pod(initContainerStatuses=[{"name": "storage-initializer", "state": {"running": {}}}])]),
            Scene(pods=[pod(container={"state": {"waiting": {"reason": "ContainerCreating"}}})]),
            Scene(pods=[running_pod(is_ready=False)]),
            Scene(ready_conditions(), [running_pod(is_ready=False)], on_show=lambda: server.run(server.load)),
            Scene(ready_conditions(), [running_pod(is_ready=True)]),
        ]
        with FakeCluster(scenes, pod_port=server.port) as cluster:
            assert run(cluster, "--question=once upon") == 0
    stages = [line.partition(" s  ")[2] for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert stages == [
        "no pod yet: waiting for the webhook",
        "waiting for a node: no node takes the pod: 0/3 nodes are available",
        "storage-initializer: fetching the model",
        "pulling the image",
        "loading: weights",
        "loading: ready",
        "ready",
    ]


def test_it_prints_the_answer_and_how_to_ask_on(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with RestHarness() as server, ready_cluster(server) as cluster:
        assert run(cluster, "--question=once upon") == 0
    out = capsys.readouterr().out
    assert "applied InferenceService tales/demo" in out
    assert "'once upon'\n-> '" in out
    assert "kubectl -n tales port-forward pod/demo-predictor-1 8080" in out


def test_a_ready_that_is_older_than_the_change_does_not_count(run: Any) -> None:
    with RestHarness() as server:
        pods = [running_pod(is_ready=True)]
        scenes = [Scene(ready_conditions(), pods, is_stale=True)] * 2 + [Scene(ready_conditions(), pods)]
        with FakeCluster(scenes, pod_port=server.port) as cluster:
            assert run(cluster) == 0
            assert cluster._shown == 2


def test_what_is_applied_is_strict_and_takes_the_settings(run: Any) -> None:
    with RestHarness() as server, ready_cluster(server) as cluster:
        run(cluster, "--max-model-len", "4096", "--gpus=1", "--grace-period-seconds=90", "--storage-uri=pvc://w/q")
        document, query = cluster.applied[0]
    assert query["fieldValidation"] == ["Strict"]
    assert query["fieldManager"] == ["pagoda-deploy"]
    predictor = document["spec"]["predictor"]
    (container,) = predictor["containers"]
    assert container["args"] == [
        *("serve", "--model_name=demo", "--max_model_len=4096", "--grace_period_seconds=90"),
        *("--api_keys_file=/etc/pagoda-keys", "--model_dir=/mnt/models"),
    ]
    assert container["env"] == [{"name": "STORAGE_URI", "value": "pvc://w/q"}]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert predictor["terminationGracePeriodSeconds"] == 110


def made(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["deploy", "--dry-run", "--allow-unauthenticated", "--allow-all-ingress", *arguments]) == 0
    document = yaml.safe_load(capsys.readouterr().out)
    assert isinstance(document, dict)
    return document


def test_what_it_makes_says_what_the_manifest_says(capsys: pytest.CaptureFixture[str]) -> None:
    ours = made(capsys=capsys)
    manifest = yaml.safe_load((REPOSITORY / "manifests/base/inference-service.yaml").read_text())
    assert ours["metadata"] == manifest["metadata"]
    predictor, theirs = ours["spec"]["predictor"], manifest["spec"]["predictor"]
    assert predictor.keys() == theirs.keys()
    for key in predictor.keys() - {"containers", "volumes"}:
        assert predictor[key] == theirs[key], key
    (container,), (other,) = predictor["containers"], theirs["containers"]
    assert container.keys() == other.keys()
    for key in container.keys() - {"resources"}:
        assert container[key] == other[key], key


@pytest.mark.skipif(crds() is None, reason=f"KServe's CRDs are not here; {CRDS_VARIABLE} may name their folder")
def test_crds_know_every_field_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    document = made("--gpus=2", "--storage-uri=hf://a/b", capsys=capsys)
    assert crd_errors(document) == []
    assert build_model(document).spec.predictor.min_replicas == 1


def test_a_file_of_one_s_own_is_applied_as_it_is(run: Any, tmp_path: Path) -> None:
    source = REPOSITORY / "manifests/base/inference-service.yaml"
    with RestHarness() as server, ready_cluster(server) as cluster:
        run(cluster, f"--file={source}")
        assert cluster.applied[0][0] == yaml.safe_load(source.read_text())


@pytest.mark.parametrize(("what", "blocked", "sentence"), BLOCKED, ids=[what for what, _, _ in BLOCKED])
def test_what_does_not_pass_by_waiting_is_an_error(run: Any, what: str, blocked: dict[str, Any], sentence: str) -> None:
    with FakeCluster([Scene(pods=[blocked])]) as cluster, pytest.raises(PagodaError) as error:
        run(cluster)
    assert sentence in str(error.value)


def test_the_log_of_a_restarted_container_is_that_of_its_life_before(run: Any) -> None:
    with FakeCluster([Scene(pods=[BLOCKED[2][1]])]) as cluster:
        with pytest.raises(PagodaError):
            run(cluster)
        (request,) = cluster.log_requests
    assert request["previous"] == ["True"] or request["previous"] == ["true"]
    assert request["container"] == ["kserve-container"]


def test_no_gpu_is_an_error_once_the_cluster_had_time_to_grow(run: Any, clock: Clock) -> None:
    began = clock()
    with (
        FakeCluster([Scene(pods=[unschedulable("0/2 nodes: 2 Insufficient nvidia.com/gpu.")])]) as cluster,
        pytest.raises(PagodaError, match=r"no node has a free GPU: 0/2 nodes: 2 Insufficient nvidia.com/gpu"),
    ):
        run(cluster, "--gpus=1")
    assert clock() - began > deploy.PATIENCE_SECONDS


def test_a_server_that_never_gets_ready_is_an_error_with_probe_and_log(run: Any) -> None:
    with FakeCluster([Scene(pods=[running_pod(is_ready=False)])]) as cluster:
        cluster.events = [
            {"type": "Normal", "reason": "Pulled", "message": "x", "lastTimestamp": "2026-01-01T00:00:01Z"},
            {
                "type": "Warning",
                "reason": "Unhealthy",
                "message": "Startup probe failed: HTTP probe failed with statuscode: 503",
                "lastTimestamp": "2026-01-01T00:00:02Z",
            },
        ]
        with pytest.raises(PagodaError) as error:
            run(cluster, "--timeout=0.2")
    assert "demo is not ready after 0.2 s: loading" in str(error.value)
    assert "Unhealthy: Startup probe failed: HTTP probe failed with statuscode: 503" in str(error.value)
    assert str(error.value).endswith("first line\nlast line")


@pytest.mark.parametrize(
    ("refusal", "sentence"),
    [
        (status(404, "the server could not find the requested resource"), "KServe is not installed in this cluster"),
        ((404, "404 page not found"), "KServe is not installed in this cluster"),
        (status(404, 'namespaces "tales" not found', kind="namespaces", name="tales"), "name another with --namespace"),
        (
            status(403, "inferenceservices is forbidden: User cannot patch"),
            "not allowed: inferenceservices is forbidden",
        ),
        (status(422, "spec.predictor: Invalid value", name="demo"), "is refused: spec.predictor: Invalid value"),
        (status(400, 'unknown field "spec.predictr"', name="demo"), 'unknown field "spec.predictr"'),
        (status(500, "webhook down", name="demo"), "the cluster answers 500: webhook down"),
    ],
)
def test_a_refusal_is_told_in_a_sentence(run: Any, refusal: tuple[int, Any], sentence: str) -> None:
    with FakeCluster([Scene()], refuse=refusal) as cluster, pytest.raises(PagodaError) as error:
        run(cluster)
    assert sentence in str(error.value)


def test_no_cluster_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", f"--kubeconfig={tmp_path / 'none'}"]) == 2
    assert "no cluster is configured" in capsys.readouterr().err


def test_a_cluster_out_of_reach(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = FakeCluster([Scene()])
    kubeconfig = cluster.write_kubeconfig(tmp_path / "kubeconfig")
    cluster._server.server_close()
    assert main(["deploy", f"--kubeconfig={kubeconfig}"]) == 2
    assert f"the cluster at {cluster.url} cannot be reached" in capsys.readouterr().err


def test_a_model_that_wants_another_key_is_ready_all_the_same(run: Any) -> None:
    with (
        RestHarness(api_keys=("secret",)) as server,
        ready_cluster(server) as cluster,
        pytest.raises(PagodaError, match="is ready; it requires an API key"),
    ):
        run(cluster, "--allow-unauthenticated")


def test_it_makes_a_key_keeps_it_and_asks_with_it(run: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "other").write_text("another-key")
    with RestHarness(api_keys_file=str(tmp_path / "keys")) as server, ready_cluster(server) as cluster:
        with pytest.raises(PagodaError, match="requires an API key"):
            run(cluster)  # the pod has not been given the Secret, which is made now
        (values,) = cluster.secrets.values()
        for name, key in values.items():
            (tmp_path / "keys" / name).write_text(key)
        server.context.keys.reload()
        assert run(cluster) == 0
    assert list(cluster.secrets) == ["demo-api-keys"]
    (key,) = values.values()
    assert len(key) == 64
    container = cluster.applied[-1][0]["spec"]["predictor"]["containers"][0]
    assert "--api_keys_file=/etc/pagoda-keys" in container["args"]
    assert {"name": "api-keys", "mountPath": "/etc/pagoda-keys", "readOnly": True} in container["volumeMounts"]
    (volume,) = [v for v in cluster.applied[-1][0]["spec"]["predictor"]["volumes"] if v["name"] == "api-keys"]
    assert volume["secret"]["secretName"] == "demo-api-keys"
    shown = capsys.readouterr().out
    assert key not in shown + str(cluster.applied)
    assert "get secret demo-api-keys -o jsonpath='{.data.pagoda-deploy}' | base64 -d)" in shown
    assert 'curl -H "Authorization: Bearer $KEY" http' in shown


def test_a_secret_that_is_named_is_taken_and_must_be_there(run: Any) -> None:
    with RestHarness(api_keys=("first-key-of-it",)) as server, ready_cluster(server) as cluster:
        with pytest.raises(PagodaError, match="there is no Secret tales/clients"):
            run(cluster, "--api-keys-secret=clients")
        assert cluster.applied == []
        cluster.secrets["clients"] = {"api-keys": "first-key-of-it,another-key"}
        assert run(cluster, "--api-keys-secret=clients") == 0
    assert list(cluster.secrets) == ["clients"]


@pytest.mark.parametrize(
    ("options", "namespaces"),
    [([], []), (["--allow-from=gateway", "--allow-from=monitoring"], ["gateway", "monitoring"])],
)
def test_a_policy_lets_in_its_own_namespace_and_those_that_are_named(
    run: Any, options: list[str], namespaces: list[str]
) -> None:
    with RestHarness() as server, ready_cluster(server) as cluster:
        assert run(cluster, *options) == 0
    (policy,) = cluster.policies
    validate(policy)
    assert policy["spec"]["podSelector"] == {"matchLabels": {"app": "isvc.demo-predictor"}}
    (rule,) = policy["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [8080, 8081]
    labels = [peer["namespaceSelector"]["matchLabels"] for peer in rule["from"][1:]]
    assert rule["from"][0] == {"podSelector": {}}
    assert labels == [{"kubernetes.io/metadata.name": name} for name in namespaces]


def test_what_is_opened_is_opened_by_name_and_warned_of(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with RestHarness() as server, ready_cluster(server) as cluster:
        assert run(cluster, "--allow-unauthenticated", "--allow-all-ingress") == 0
    assert (cluster.secrets, cluster.policies) == ({}, [])
    warnings = capsys.readouterr().err
    assert "--allow-unauthenticated" in warnings
    assert "--allow-all-ingress" in warnings


def test_a_dry_run_prints_what_can_be_applied_and_no_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["deploy", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert [document["kind"] for document in yaml.safe_load_all(text)] == ["NetworkPolicy", "InferenceService"]
    assert "kubectl create secret generic demo-api-keys --from-literal=pagoda-deploy=$(openssl rand -hex 32)" in text


def test_namespace_is_the_option_s_then_the_context_s_then_default(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with RestHarness() as server:
        for options, namespace in ((["--namespace=other"], "other"), ([], "tales")):
            with FakeCluster(
                [Scene(ready_conditions(), [running_pod(is_ready=True)])], pod_port=server.port
            ) as cluster:
                run(cluster, *options)
            assert f"applied InferenceService {namespace}/demo" in capsys.readouterr().out
        with ready_cluster(server) as cluster:
            run(cluster, namespace=None)
        assert "applied InferenceService default/demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--name=A_b"], "name=A_b: must be a DNS label"),
        (["--api-keys=k"], "api_keys"),
        (["--api-keys-file=/"], "api_keys_file"),
        (["--api-keys-secret=x", "--allow-unauthenticated"], "contradicts --allow-unauthenticated"),
        (["--allow-from=x", "--allow-all-ingress"], "contradicts --allow-all-ingress"),
        (["--model-name=x"], "use --name"),
        (["--max-model-len=0"], "max_model_len=0"),
        (["--http-port=0"], "http_port and grpc_port must be named"),
        (["--model=a/b", "--storage-uri=hf://a/b"], "contradicts --model"),
        (["--config=x.yaml"], "is a file of this machine"),
        (["--file=/nowhere.yaml"], "--file /nowhere.yaml cannot be read"),
        (["--file=x.yaml", "--seed=1"], "with --file, settings belong into its args"),
    ],
)
def test_wrong_arguments_are_named_before_the_cluster_is_asked(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["deploy", "--dry-run", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_must_hold_one_inference_service(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("kind: Pod\n")
    assert main(["deploy", "--dry-run", f"--file={file}"]) == 2
    assert "must hold one InferenceService" in capsys.readouterr().err


def test_why_says_what_keeps_a_pod_from_being_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, crashed, _ = BLOCKED[2]
    with FakeCluster([Scene(pods=[crashed, running_pod(is_ready=True)])]) as cluster:
        cluster.logs = "2026 INFO a\n2026 ERROR pagoda: no config.json\n"
        cluster.events = [{"type": "Warning", "message": "Back-off restarting failed container"}]
        where = ["--kubeconfig", str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))]
        name = crashed["metadata"]["name"]
        assert main(["why", "--pod", name, *where]) == 1
        out = capsys.readouterr().out
        assert "the container kserve-container ended with exit status 2" in out
        assert "seen: event: Back-off restarting failed container" in out
        assert "seen: log: 2026 ERROR pagoda: no config.json" in out
        assert cluster.log_requests[-1]["previous"] == ["true"]
        assert main(["why", "--pod", "none", *where]) == 2
        assert 'pods "none" not found' in capsys.readouterr().err
    with FakeCluster([Scene(pods=[running_pod(is_ready=True)])]) as cluster:
        where = ["--kubeconfig", str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))]
        assert main(["why", "--pod", name, *where]) == 0
