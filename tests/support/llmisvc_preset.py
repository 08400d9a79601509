"""The container that KServe's LLMInferenceService runs, as its presets make it for one node, several, and disaggregation.

What they do stands here in few lines: they ask `vllm --version` for the version, choose flags by it, and have a shell put the
command together twice (`eval`), so that quotes in VLLM_ADDITIONAL_ARGS and in the container's own arguments count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_BY_VERSION = r"""
version=$(vllm --version 2>/dev/null | tail -1 | awk '{print $NF}')
at_least() { [ "$(printf '%s\n%s\n' "$1" "$version" | sort -V | head -1)" = "$1" ]; }
ACCESS_LOG_ARGS="--disable-uvicorn-access-log"
if [[ "$version" =~ ^[0-9]+\.[0-9]+ ]]; then
  at_least 0.16.0 && ACCESS_LOG_ARGS="--disable-access-log-for-endpoints /health,/metrics,/ping"
  at_least 0.18.0 && SHUTDOWN_TIMEOUT_ARGS="--shutdown-timeout 40"
  at_least 0.22.0 && KV_TRANSFER_ARGS="@KV_TRANSFER@"
fi
"""

SINGLE_NODE = ()
DATA_PARALLEL = (
    *(
        "--api-server-count",
        "8",
        "--enable-expert-parallel",
        "--data-parallel-size",
        "4",
        "--data-parallel-size-local",
        "2",
    ),
    *("--data-parallel-address", "10.0.0.1", "--data-parallel-rpc-port", "5555", "--data-parallel-start-rank", "0"),
)
PIPELINE_PARALLEL = (
    *("--pipeline-parallel-size", "2", "--nnodes", "2", "--node-rank", "0"),
    *("--master-addr", "10.0.0.1", "--master-port", "29500"),
)
DISAGGREGATED = ("--kv-transfer-config", """'{"kv_connector":"NixlConnector","kv_role":"kv_both"}'""")
OFFLOADING = """--kv-transfer-config '{\\"kv_connector\\":\\"OffloadingConnector\\",\\"kv_role\\":\\"kv_both\\"}'"""


def adapters(path: str) -> tuple[str, ...]:
    """Of `spec.model.lora` with one adapter, `sql`; in a pod it is below /mnt/lora."""
    return ("--enable-lora", "--max-lora-rank", "64", "--max-loras", "2", "--lora-modules", f"sql={path}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What the controller fills in. `models`, `port`, `tls`: in a pod /mnt/models, 8000 and /var/run/kserve/tls, or no TLS."""

    name: str
    namespace: str
    models: str
    port: int
    tls: str | None = None
    topology: Sequence[str] = SINGLE_NODE
    kv_transfer: str = ""

    def command(self, *arguments: str) -> list[str]:
        """`command` and `args` of the container; `arguments` are the user's own `args`."""
        tls = (
            ""
            if self.tls is None
            else (f"--enable-ssl-refresh --ssl-certfile {self.tls}/tls.crt --ssl-keyfile {self.tls}/tls.key")
        )
        script = _BY_VERSION.replace("@KV_TRANSFER@", self.kv_transfer) + (
            f'eval "exec vllm serve {self.models} '
            f'--served-model-name "{self.name}" "publishers/{self.namespace}/models/{self.name}" '
            f"--port {self.port} {' '.join(self.topology)} "
            f"${{ACCESS_LOG_ARGS}} ${{SHUTDOWN_TIMEOUT_ARGS}} ${{KV_TRANSFER_ARGS}} {tls} "
            '${VLLM_ADDITIONAL_ARGS} $@"'
        )
        return ["/bin/bash", "-c", script, "--", *arguments]
