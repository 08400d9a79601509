"""Trains an EAGLE-3 head on what `collect.py` has recorded, and writes it as SGLang, vLLM and Pagoda load it.

    python train.py MODEL --data DATA --output HEAD [--minutes 30] [--steps 1000000] [--threads 1] [--one-round 0.5]

The head begins as the model's last layer, over the latest of the hidden states that it reads. Its loss is the cross-entropy
with the model's own distribution over the draft vocabulary: the tokens that answers consist of most. The learning rate falls
to nothing with the steps, or with the minutes where these are over sooner. With `--steps` alone a run is deterministic.

Data may still be collected while a run goes on: each pass over them takes what is there by then. With `--held-out`, a
directory of other answers, the share of drafts that are the model's own first choice is measured on those, too, every few
minutes, and the head as it is by then is written.

A round of drafting costs as much as the first one, and the first draft is the one that counts most: with `--one-round` only it
is practised in the first part of a run, which then sees two to three times as many tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as functional
from head import Head
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROUNDS, ROUND_WEIGHT = 3, 0.8
WARM_UP_STEPS, LONGEST = 30, 320
PRINT_EVERY = 10
SECONDS_BETWEEN_CHECKS = 300

Answer = tuple[torch.Tensor, int, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--draft-vocab-size", type=int, default=8192, help="at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-round", type=float, default=0.0, help="share of the run in which one draft is practised")
    parser.add_argument("--bfloat16", action="store_true", help="multiply in bfloat16, where the CPU is faster at it")
    parser.add_argument("--held-out", type=Path, help="answers of `collect.py` to other prompts, to measure on")
    parser.add_argument("--noise", type=float, default=0.0, help="of hidden states, relative; against little data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    config = json.loads((options.model / "config.json").read_text())
    with safe_open(options.model / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name).float() for name in names_of(config, file.keys())}
    answers = list(recorded(options.data))
    token_ids = draft_vocabulary(answers, config["vocab_size"], options.draft_vocab_size)
    # The token reaches the residual stream through the values only: with few KV heads that is a narrow way.
    num_kv_heads, config["num_key_value_heads"] = config["num_key_value_heads"], config["num_attention_heads"]
    config["draft_vocab_size"] = len(token_ids)
    head = Head(config)
    target_head = begin_as_last_layer(head, weights, config, token_ids, num_kv_heads)
    trainer = Trainer(head, weights, target_head, options)
    trainer.run(answers, lambda: write(head, config, token_ids, options.output))
    write(head, config, token_ids, options.output)


def names_of(config: dict, names: list[str]) -> list[str]:
    """The model's tensors that a head begins with."""
    last = f"model.layers.{config['num_hidden_layers'] - 1}."
    return [name for name in names if name.startswith(last) or ".layers." not in name]


def recorded(directory: Path) -> Iterator[Answer]:
    """The answers that are there by now."""
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for number in range(len(tensors) // 3):
            yield tensors[f"tokens.{number}"].long(), int(tensors[f"first.{number}"]), tensors[f"states.{number}"]


def draft_vocabulary(answers: list[Answer], vocab_size: int, largest: int) -> torch.Tensor:
    """The most frequent tokens of answers, 99.5 % of them where that is fewer; ids, ascending."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for tokens, first, _ in answers:
        counts += torch.bincount(tokens[first:], minlength=vocab_size)
    by_frequency = counts.argsort(descending=True, stable=True)
    covered = counts[by_frequency].cumsum(0) / counts.sum()
    size = int((covered < 0.995).sum()) + 1
    size = min(largest, vocab_size, -(-size // 128) * 128)
    print(f"draft vocabulary: {size} tokens, {100 * float(covered[size - 1]):.1f} % of all", flush=True)
    return by_frequency[:size].sort().values


def begin_as_last_layer(
    head: Head, weights: dict[str, torch.Tensor], config: dict, token_ids: torch.Tensor, num_kv_heads: int
) -> torch.Tensor:
    """Fill the head from the model; returns the model's own head over the draft vocabulary."""
    last, hidden = f"model.layers.{config['num_hidden_layers'] - 1}.", config["hidden_size"]
    output = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])[token_ids]
    layer = head.midlayer
    with torch.no_grad():
        head.fc.weight.mul_(0.1)
        head.fc.weight[:, 2 * hidden :] += torch.eye(hidden)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name).weight
            of_model = weights[f"{last}self_attn.{name}.weight"]
            if name != "q_proj":
                each = of_model.view(num_kv_heads, -1, hidden)
                of_model = each.repeat_interleave(config["num_attention_heads"] // num_kv_heads, dim=0).flatten(0, 1)
            weight[:, hidden:] = of_model
        layer.self_attn.o_proj.weight.copy_(weights[f"{last}self_attn.o_proj.weight"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(layer.mlp, name).weight.copy_(weights[f"{last}mlp.{name}.weight"])
        layer.hidden_norm.weight.copy_(weights[f"{last}input_layernorm.weight"])
        layer.post_attention_layernorm.weight.copy_(weights[f"{last}post_attention_layernorm.weight"])
        head.norm.weight.copy_(weights["model.norm.weight"])
        head.lm_head.weight.copy_(output)
    return output


class Trainer:
    """Trains `head`. `weights`: the model's; `target_head`: its own head over the draft vocabulary."""

    def __init__(
        self, head: Head, weights: dict[str, torch.Tensor], target_head: torch.Tensor, options: argparse.Namespace
    ) -> None:
        self.head = head
        self.weights = weights
        self.target_head = target_head
        self.options = options
        self.optimizers = make_optimizers(head, options.learning_rate)
        self.held_out = list(recorded(options.held_out)) if options.held_out else []

    def run(self, answers: list[Answer], keep: Callable[[], None]) -> None:
        """`keep` is called now and then, with a head that is better than the one before."""
        options, head = self.options, self.head
        started = checked = time.monotonic()
        step, shown, random = 0, [], Random(options.seed)
        while True:
            for batch in batches(answers, options.batch_tokens, random):
                minutes = (time.monotonic() - started) / 60
                progress = max(step / options.steps, minutes / options.minutes)
                if progress >= 1:
                    self.check(minutes)
                    return
                factor = min((step + 1) / WARM_UP_STEPS, 1.0, 1.5 * (1 - progress))
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = options.learning_rate * factor
                num_rounds = 1 if progress < options.one_round else ROUNDS
                loss, rights = self.loss_of(batch, num_rounds, options.noise)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                head.zero_grad()
                step += 1
                if shown and len(shown[-1]) != 1 + num_rounds:
                    shown = []
                shown.append([float(loss.detach()), *rights])
                if step % PRINT_EVERY == 0:
                    loss_shown, *shares = torch.tensor(shown).mean(0).tolist()
                    shown = []
                    print(
                        f"step {step}, {minutes:.1f} min, {time.process_time() / 60:.1f} of CPU: "
                        f"loss {loss_shown:.3f}, drafts as the model: {percents(shares)}",
                        flush=True,
                    )
                if time.monotonic() - checked > SECONDS_BETWEEN_CHECKS:
                    checked = time.monotonic()
                    self.check(minutes)
                    keep()
            answers = list(recorded(options.data))

    def check(self, minutes: float) -> None:
        """Print how the head does on answers that it is not trained on."""
        if not self.held_out:
            return
        with torch.no_grad():
            rights = [
                self.loss_of(batch, ROUNDS, noise=0.0)[1]
                for batch in batches(self.held_out, self.options.batch_tokens, Random(0))
            ]
        print(
            f"held out, {minutes:.1f} min: drafts as the model: {percents(torch.tensor(rights).mean(0).tolist())}",
            flush=True,
        )

    def loss_of(self, batch: list[Answer], num_rounds: int, noise: float) -> tuple[torch.Tensor, list[float]]:
        """The loss of a batch, and of each round the share of drafts that are the model's first choice."""
        hidden = self.target_head.shape[1]
        length = min(LONGEST, max(len(tokens) for tokens, _, _ in batch)) - 2  # the head's positions
        states = torch.zeros(len(batch), length, 3 * hidden)
        tokens = torch.zeros(len(batch), length, dtype=torch.long)
        outputs = torch.zeros(len(batch), length, hidden)
        counts = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, (known, first, recorded_states) in enumerate(batch):
            size = min(length, len(known) - 2)
            states[row, :size] = recorded_states[:size, : 3 * hidden]
            tokens[row, :size] = known[1 : 1 + size]
            outputs[row, :size] = recorded_states[1 : 1 + size, 3 * hidden :]
            counts[row, max(0, first - 2) : size] = True
        if noise:
            states *= 1 + noise * torch.randn_like(states)
        where = counts.flatten().nonzero().squeeze(1)
        eps = self.head.midlayer.hidden_norm.eps
        with torch.autocast("cpu", torch.bfloat16) if self.options.bfloat16 else contextlib.nullcontext():
            with torch.no_grad():
                final = functional.rms_norm(
                    outputs.flatten(0, 1)[where], (hidden,), self.weights["model.norm.weight"], eps
                )
                wanted = functional.linear(final, self.target_head).float().softmax(-1)
            results = self.head(states, self.weights["model.embed_tokens.weight"][tokens], num_rounds)
            loss, rights = torch.zeros(()), []
            for number, result in enumerate(results):
                chosen = result.flatten(0, 1)[where]
                logits = self.head.lm_head(chosen).float()
                each = functional.cross_entropy(logits, wanted)
                loss = loss + ROUND_WEIGHT**number * each
                rights.append(float((logits.argmax(-1) == wanted.argmax(-1)).float().mean()))
        return loss, rights


def percents(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.1f} %" for share in shares)


def make_optimizers(head: Head, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layer, which takes about half of AdamW's steps; AdamW for the rest, as is usual."""
    matrices = [
        weight for name, weight in head.named_parameters() if weight.ndim == 2 and not name.startswith("lm_head")
    ]
    others = [weight for weight in head.parameters() if all(weight is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batches(answers: list[Answer], num_tokens: int, random: Random) -> Iterator[list[Answer]]:
    """All answers once, in batches of about equal lengths."""
    order = sorted(range(len(answers)), key=lambda index: (len(answers[index][0]) // 32, random.random()))
    groups: list[list[Answer]] = [[]]
    for index in order:
        answer = answers[index]
        longest = max(len(each[0]) for each in [*groups[-1], answer])
        if groups[-1] and min(longest, LONGEST) * (len(groups[-1]) + 1) > num_tokens:
            groups.append([])
        groups[-1].append(answer)
    random.shuffle(groups)
    yield from groups


def write(head: Head, config: dict, token_ids: torch.Tensor, output: Path) -> None:
    """The checkpoint, in bfloat16."""
    output.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in head.state_dict().items()}
    tensors["d2t"] = token_ids - torch.arange(len(token_ids))
    tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill_(0, token_ids, True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    kept = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    kept += ("rms_norm_eps", "rope_parameters", "max_position_embeddings", "hidden_act", "draft_vocab_size")
    values = {key: config[key] for key in kept} | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "norm_before_residual": True,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (output / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    print(f"{sum(tensor.nbytes for tensor in tensors.values()) / 1e6:.1f} MB in {output}")


if __name__ == "__main__":
    main()
