"""What traces cost the server's event loop a request and a token: off, on and not sampled, on and sampled.

    PYTHONPATH=runtime:kernels python -m benchmarks.tracing

CPU time of the loop's thread around a request without a model, the best of many in turn. Spans are put into the queue of the
SDK, whose thread is kept from sending them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from pagoda.request import GenerationRequest
from pagoda.sampling.output import FinishReason
from pagoda.sampling.params import SamplingParams
from pagoda.serving.tracing.seam import Tracing
from pagoda.text.output import GenerationChunk

ROUNDS = 400
TOKENS = (2, 100)
SAMPLED = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
NOT_SAMPLED = {"traceparent": SAMPLED["traceparent"][:-1] + "0"}
SCOPE = {"method": "POST", "path": "/v1/completions", "scheme": "http", "client": ("127.0.0.1", 1)}
JOB = GenerationRequest(request_id="request", params=SamplingParams())


class Meter:
    """In the place of the metrics, which count with and without traces."""

    def on_chunk(self, chunk: GenerationChunk) -> None: ...

    def on_end(self, error: BaseException | None) -> None: ...


def request(tracing: Tracing, chunks: Sequence[GenerationChunk], headers: dict[str, str]) -> float:
    """CPU seconds of one."""
    begun = time.thread_time()
    with tracing.http_call(SCOPE, headers.get, lambda: 200) as span:
        span.begin()
        observer = tracing.observer("model", JOB, time.monotonic(), Meter())
        for chunk in chunks:
            observer.on_chunk(chunk)
        observer.on_end(None)
    return time.thread_time() - begun


def main() -> None:
    """Print the figures."""
    os.environ |= {"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_BSP_MAX_QUEUE_SIZE": "1000000"}
    os.environ["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "1000000"
    from pagoda.serving.tracing.otel import OtelTracing

    tracing = OtelTracing("http://127.0.0.1:9/v1/traces")
    kinds = {"off": (Tracing(), SAMPLED), "on, not sampled": (tracing, NOT_SAMPLED), "on, sampled": (tracing, SAMPLED)}
    first = GenerationChunk(token_ids=[1], num_prompt_tokens=5, num_cached_tokens=0, scheduled_time=time.monotonic())
    last = GenerationChunk(token_ids=[1], finish_reason=FinishReason.STOP)
    best = dict.fromkeys(((name, count) for name in kinds for count in TOKENS), float("inf"))
    for _ in range(ROUNDS):
        for name, count in best:
            chunks = [first, *(GenerationChunk(token_ids=[1]) for _ in range(count - 2)), last]
            best[name, count] = min(best[name, count], request(kinds[name][0], chunks, kinds[name][1]))
    few, many = TOKENS
    for name in kinds:
        a_token = (best[name, many] - best[name, few]) / (many - few)
        print(
            f"{name:<16} {best[name, few] * 1e6:6.1f} us a request of {few} tokens, {a_token * 1e9:4.0f} ns a further token"
        )
    os._exit(0)  # without sending what was queued


if __name__ == "__main__":
    main()
