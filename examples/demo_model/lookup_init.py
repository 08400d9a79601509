"""A start from which looking back is learnt at once: an induction circuit sketched into the random weights.

Copying, reversing and recalling all need heads that find an earlier token and read what follows it. From random weights
such heads appear only after a long plateau (Olsson et al., 2022), which a small CPU budget cannot afford. So some heads of
the first two layers start as a rough version of that circuit; training refines it and is free to undo it.

    layer 0, offset head: position t attends to t - d and writes V x[t-d] into scratch columns, which embeddings leave free
    layer 1, match head:  query V x[t] meets the scratch V x[s-1], so t attends to the token after an earlier x[t]; what it
                          reads there it writes back as that token's own embedding, which the tied output head understands
"""

from __future__ import annotations

import torch
from model import DemoModel
from tokenizers import Tokenizer
from torch import nn

CONSTANT = 4.0  # column 0 of the embedding, in units of the other columns' spread
SCRATCH_SPREAD = 0.2  # the same for the scratch columns
OFFSETS = (1, 2, 3)
FAST_PAIRS = 8  # rotary pairs quick enough to tell neighbours apart
OFFSET_SHARPNESS, MATCH_SHARPNESS = 2.0, 2.6
OFFSET_OUTPUT, MATCH_OUTPUT = 0.12, 0.25


SPACE = "Ġ"  # how byte-level BPE writes a leading space
FORM_OFFSET = 0.4  # length of the step from a word after a space to the same word at a line's start


@torch.no_grad()
def pair_word_forms(model: DemoModel, tokenizer: Tokenizer) -> None:
    """Start the two tokens of a word, after a space and at a line's start, with one embedding but for a common step.

    An answer often begins with a word that the question has after a space; without this every such pair is learnt alone.
    """
    embedding, vocabulary = model.model.embed_tokens.weight, tokenizer.get_vocab()
    bare = [word for word in vocabulary if len(word) > 1 and word.isalpha() and SPACE + word in vocabulary]
    step = nn.init.normal_(torch.empty(embedding.shape[1]))
    after_space = embedding[[vocabulary[SPACE + word] for word in bare]]
    embedding[[vocabulary[word] for word in bare]] = after_space + FORM_OFFSET * step / step.norm()


@torch.no_grad()
def sketch_lookup(model: DemoModel) -> None:
    """Write the circuit into `model`'s fresh weights. Uses torch's global random numbers."""
    shape = model.shape
    size, groups = shape.head_dim, shape.num_attention_heads // shape.num_key_value_heads
    scratch = shape.hidden_size - len(OFFSETS) * size  # columns from here on are scratch, one block per offset
    basis = nn.init.orthogonal_(torch.empty(scratch - 1, scratch - 1))
    embedding = model.model.embed_tokens.weight
    embedding[:, scratch:] *= SCRATCH_SPREAD
    embedding[:, 1:] /= embedding[:, 1:].norm(dim=1, keepdim=True)  # one norm for all, or the norm would blur offsets
    embedding[:, 0] = CONSTANT * shape.hidden_size**-0.5

    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    frequencies = shape.rope_theta ** (-torch.arange(0, size, 2) / size)
    fast = OFFSET_SHARPNESS * (torch.arange(size // 2) < FAST_PAIRS)
    for head, offset in enumerate(OFFSETS):
        group = head // groups
        rows, key_rows = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
        first.k_proj.weight[key_rows] = 0
        first.k_proj.weight[key_rows, 0] = torch.cat((fast, torch.zeros(size // 2)))
        phase = frequencies * offset
        first.q_proj.weight[rows] = 0
        first.q_proj.weight[rows, 0] = torch.cat((fast * phase.cos(), -fast * phase.sin()))
        first.v_proj.weight[key_rows] = 0
        first.v_proj.weight[key_rows, 1:scratch] = basis[:size]
        first.o_proj.weight[:, rows] = 0
        block = slice(scratch + head * size, scratch + (head + 1) * size)
        first.o_proj.weight[block, rows] = OFFSET_OUTPUT * torch.eye(size)

    slow = torch.arange(size // 4, size // 2)  # rotary pairs that hardly turn over the context
    places = torch.cat((slow, slow + size // 2))
    for group in range(2):
        parts = torch.arange(len(places)) + group * len(places)
        key_rows = slice(group * size, (group + 1) * size)
        second.k_proj.weight[key_rows] = 0
        second.k_proj.weight[group * size + places, scratch + parts] = MATCH_SHARPNESS
        second.v_proj.weight[key_rows] = 0
        read = basis[group * size : (group + 1) * size]
        second.v_proj.weight[key_rows, 1:scratch] = read
        for head in range(group * groups, (group + 1) * groups):
            rows = slice(head * size, (head + 1) * size)
            second.q_proj.weight[rows] = 0
            second.q_proj.weight[head * size + places, 1:scratch] = MATCH_SHARPNESS * basis[parts]
            second.o_proj.weight[:, rows] = 0
            second.o_proj.weight[1:scratch, rows] = MATCH_OUTPUT * read.T
