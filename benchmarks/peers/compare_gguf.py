"""Pagoda and llama.cpp on one GGUF file, in turn: decode, prefill and the time to ready.

    python benchmarks/peers/compare_gguf.py MODEL.gguf [--batch-sizes 1 8] [--rounds 5] [--tokens 32] [--threads 2]

llama.cpp is built for this processor (`make peers PEERS=llamacpp`). Beside the rates stands the bound: what this machine reads
in the same minutes, divided by the bytes of the file that a step needs at least. Of experts these are the chosen ones, of a
batch as many different ones as choices at random make.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import gguf

from harness.checkpoints import HERE, python_of
from harness.engine import EngineSettings
from harness.measure import Case
from harness.process import Worker
from harness.results import OWN

PEER = "llamacpp"
PROMPT_TOKENS = 32
FIGURES = ("decode_tokens_per_second", "prefill_tokens_per_second")


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a file: its vocabulary, what a token takes of a KV cache in bfloat16, and the bytes that steps read."""

    vocabulary: int
    kv_token_bytes: int
    shared_bytes: int
    expert_bytes: int  # of all experts
    chosen_share: float

    @classmethod
    def of(cls, path: Path) -> Facts:
        file = gguf.GGUFReader(path)

        def value(key: str, default: int) -> int:
            field = file.fields.get(f"{architecture}.{key}")
            return default if field is None else int(field.contents())

        architecture = str(file.fields["general.architecture"].contents())
        heads, width = value("attention.head_count", 0), value("embedding_length", 0)
        head_dim = value("attention.key_length", width // heads)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in file.tensors}
        experts = sum(size for name, size in sizes.items() if "_exps." in name)
        looked_up = sizes["token_embd.weight"] if "output.weight" in sizes else 0
        return cls(
            vocabulary=int(next(tensor.shape[1] for tensor in file.tensors if tensor.name == "token_embd.weight")),
            kv_token_bytes=4 * head_dim * value("attention.head_count_kv", heads) * value("block_count", 0),
            shared_bytes=sum(sizes.values()) - experts - looked_up,
            expert_bytes=experts,
            chosen_share=value("expert_used_count", 0) / value("expert_count", 1),
        )

    def step_bytes(self, batch_size: int) -> float:
        """At least, of weights alone."""
        return self.shared_bytes + self.expert_bytes * (1 - (1 - self.chosen_share) ** batch_size)


def main() -> None:
    """Load both, run the rounds, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    own = parser.parse_args()
    facts = Facts.of(own.model)
    cores = sorted(os.sched_getaffinity(0))[: own.threads]
    workers = {}
    try:
        with tempfile.TemporaryDirectory() as logs:
            for engine in (OWN, PEER):
                settings = settings_of(own, facts)
                workers[engine] = Worker(engine, settings, cores, Path(logs) / engine)
                workers[engine].wait_until_ready()
            run(own, facts, workers)
    finally:
        for worker in workers.values():
            worker.end()


def settings_of(own: argparse.Namespace, facts: Facts) -> EngineSettings:
    path, largest = str(own.model.absolute()), max(own.batch_sizes)
    length = -(-(PROMPT_TOKENS + own.tokens) // 256) * 256
    return EngineSettings(
        model=path,
        converted=path,
        weights="gguf",
        threads=own.threads,
        max_num_seqs=largest,
        max_model_len=length,
        kv_tokens=length * largest,
        kv_token_bytes=facts.kv_token_bytes,
        prefix_caching=False,
    )


def run(own: argparse.Namespace, facts: Facts, workers: dict[str, Worker]) -> None:
    rounds: list[dict[tuple[int, str, str], float]] = []
    reads = []
    for number in range(own.rounds + 1):  # the first one warms up
        found = {}
        for size in own.batch_sizes:
            case = Case(
                kind="batch",
                batch_size=size,
                input_tokens=PROMPT_TOKENS,
                output_tokens=own.tokens,
                vocab_size=facts.vocabulary,
                seed=number,
            )
            for engine, worker in workers.items():
                result = worker.run(case)
                found |= {(size, engine, figure): result[figure] for figure in FIGURES}
        if number:
            rounds.append(found)
            reads.append(read_bytes_per_second(own.threads))
    print("ready, s: " + ", ".join(f"{engine} {worker.load_seconds:.1f}" for engine, worker in workers.items()))
    print(f"reads {statistics.median(reads) / 1e9:.1f} GB/s ({min(reads) / 1e9:.1f}-{max(reads) / 1e9:.1f})")
    for size in own.batch_sizes:
        for figure in FIGURES:
            ratios = [found[size, OWN, figure] / found[size, PEER, figure] for found in rounds]
            medians = [statistics.median(found[size, engine, figure] for found in rounds) for engine in (OWN, PEER)]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            print(f"batch {size} {figure}: {OWN} {medians[0]:.4g}, {PEER} {medians[1]:.4g}, ratio {spread}")
        shares = [
            found[size, OWN, FIGURES[0]] / size * facts.step_bytes(size) / read
            for found, read in zip(rounds, reads, strict=True)
        ]
        print(
            f"batch {size}: {facts.step_bytes(size) / 1e6:.0f} MB a step, {statistics.median(shares):.2f} of the bound "
            f"({min(shares):.2f}-{max(shares):.2f})"
        )


def read_bytes_per_second(threads: int) -> float:
    command = [str(python_of(OWN)), str(HERE / "limits.py"), str(threads)]
    limits = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return 1e9 * float(limits[f"read_gb_per_second_{threads}_threads"])


if __name__ == "__main__":
    main()
