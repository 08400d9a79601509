"""Trains the demo model from nothing: tokenizer, weights, loss curve. Resumable; on a CPU in under three hours.

    python train.py --output /tmp/demo                     # run again with the same arguments to go on
    torchrun --nproc-per-node 2 train.py --output /tmp/demo --threads 1     # one process per core: faster on few cores
    python evaluate.py /tmp/demo/checkpoint                # scores of the newest weights

The learning rate warms up, stays, and falls to nothing over the last 30 % (warmup-stable-decay), counted in steps or in
minutes, whichever is further on. A batch follows from the seed and its step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as distributed
from batches import BatchMaker
from export import export
from generate_data import texts
from lexicon import KEY_WORDS
from lookup_init import pair_word_forms, sketch_lookup
from model import DemoModel, ModelShape
from optimizer import Optimizer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizer import save, train
from tokenizers import Tokenizer

WARMUP_STEPS, DECAY_START = 60, 0.7
TOKENIZER_DOCUMENTS = 3000


@dataclass
class State:
    """How far the run is; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def progress(self, steps: int, minutes: float) -> float:
        return min(1.0, max(self.step / steps, self.seconds / (60 * minutes)))


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm-up by steps, then one, then a straight line to zero from DECAY_START on."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    return warm * min(1.0, (1.0 - progress) / (1.0 - DECAY_START))


def prepare_tokenizer(output: Path, seed: int, shape: ModelShape) -> Tokenizer:
    """The run's tokenizer, trained on the first call."""
    directory = output / "tokenizer"
    if not (directory / "tokenizer.json").exists():
        words = ["\n".join(KEY_WORDS)] * 400  # a word at the start of an answer is one token too
        tokenizer = train(chain(words, texts(seed, TOKENIZER_DOCUMENTS)), shape.vocab_size)
        save(tokenizer, directory, shape.max_position_embeddings)
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def save_run(output: Path, model: DemoModel, optimizer: Optimizer, state: State) -> None:
    """Write the state to resume from (atomically) and the exported checkpoint."""
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": vars(state)}
    torch.save(saved, output / "state.new")
    (output / "state.new").replace(output / "state.pt")
    (output / "curve.json").write_text(json.dumps(vars(state)))
    export(model, output / "tokenizer", output / "checkpoint")


def load_run(output: Path, model: DemoModel, optimizer: Optimizer, device: torch.device) -> State:
    """The saved state put into `model` and `optimizer`, or a fresh one."""
    path = output / "state.pt"
    if not path.exists():
        return State()
    saved = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return State(**saved["state"])


def run(arguments: argparse.Namespace, rank: int, ranks: int) -> None:
    """Train until `--steps` or `--minutes` are used up. Every rank takes the same steps; rank 0 writes."""
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = device if arguments.device == "auto" else torch.device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    shape = ModelShape()
    if rank == 0:
        prepare_tokenizer(arguments.output, arguments.seed, shape)
    if ranks > 1:
        distributed.barrier()
    tokenizer = prepare_tokenizer(arguments.output, arguments.seed, shape)
    model = DemoModel(shape)
    pair_word_forms(model, tokenizer)
    sketch_lookup(model)
    model.to(device)
    trainer = Trainer(BatchMaker(tokenizer, arguments.seed, rank, ranks), model, Optimizer(model), device)
    state = load_run(arguments.output, model, trainer.optimizer, device)
    saved_at = state.seconds
    visible = rank == 0 and sys.stdout.isatty()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), disable=not visible) as bar:
        task = bar.add_task("training", total=1.0)
        while (progress := state.progress(arguments.steps, arguments.minutes)) < 1.0:
            point = trainer.step(state, progress)
            bar.update(task, completed=progress, description=f"step {state.step} loss {point['loss']:.3f}")
            if rank == 0 and state.step % 20 == 0:
                print(json.dumps(point), flush=True)
            if rank == 0 and state.seconds - saved_at > 60 * arguments.save_minutes:
                save_run(arguments.output, model, trainer.optimizer, state)
                saved_at = state.seconds
    if rank == 0:
        save_run(arguments.output, model, trainer.optimizer, state)


@dataclass
class Trainer:
    """Takes steps: a batch, its gradients averaged over the ranks, an update."""

    maker: BatchMaker
    model: DemoModel
    optimizer: Optimizer
    device: torch.device
    clock: float = field(default_factory=time.perf_counter)

    def step(self, state: State, progress: float) -> dict[str, float]:
        """One step; counts it in `state` and returns its point of the curve, the same on every rank."""
        batch = self.maker.make(state.step, progress).to(self.device)
        with torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model.loss(batch.input_ids, batch.positions, batch.targets, batch.weights)
        loss.backward()
        now = time.perf_counter()
        mean_loss, elapsed = self.average(float(loss.detach()), now - self.clock)
        self.clock = now
        norm = self.optimizer.step(learning_rate_factor(state.step, progress))
        state.step += 1
        state.tokens += batch.input_ids.numel() * self.maker.ranks
        state.seconds += elapsed
        point = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 1),
            "length": batch.input_ids.shape[1],
            "loss": round(mean_loss, 4),
            "norm": round(norm, 3),
            "progress": round(progress, 4),
        }
        state.curve.append(point)
        return point

    def average(self, *numbers: float) -> list[float]:
        """Average all gradients, and `numbers` with them, over the ranks."""
        if self.maker.ranks == 1:
            return list(numbers)
        gradients = [parameter.grad for parameter in self.model.parameters()]
        extra = torch.tensor(numbers, device=self.device)
        flat = torch.cat([gradient.flatten() for gradient in gradients] + [extra])
        distributed.all_reduce(flat)
        flat /= self.maker.ranks
        sizes = [gradient.numel() for gradient in gradients] + [len(numbers)]
        for gradient, mean in zip(gradients, flat.split(sizes), strict=False):
            gradient.copy_(mean.view_as(gradient))
        return flat[-len(numbers) :].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the run")
    parser.add_argument("--minutes", type=float, default=600.0, help="training time at most; cuts the schedule short")
    parser.add_argument("--steps", type=int, default=2800, help="steps at most")
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between two saved states")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    arguments = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        distributed.init_process_group("gloo")
    run(arguments, rank, ranks)
    if ranks > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
