"""From the settings to the scheduler's lookahead."""

from __future__ import annotations

from pagoda.config.speculation import HEAD_METHODS, MODEL_METHODS, SpeculativeConfig
from pagoda.scheduling.config import SchedulerLimits
from pagoda.scheduling.kv_cache_manager import KVCacheManager
from pagoda.scheduling.lookahead import Lookahead, MultiStep, Proposer, Speculation
from pagoda.speculation.grammar import GrammarDrafter
from pagoda.speculation.history import IndexBudget
from pagoda.speculation.model_proposer import ModelProposer
from pagoda.speculation.ngram import NgramDrafter
from pagoda.speculation.proposer import HostProposer
from pagoda.speculation.suffix import PastOutputs, SuffixDrafter


def make_lookahead(config: SpeculativeConfig | None, limits: SchedulerLimits, kv: KVCacheManager) -> Lookahead:
    """What rows do beyond the next token."""
    plain = MultiStep(limits, kv) if limits.num_scheduler_steps > 1 else Lookahead()
    if config is None:
        return plain
    return Speculation(
        kv, _make_proposer(config), config.max_draft_tokens(limits.max_num_seqs, limits.max_num_batched_tokens), plain
    )


def _make_proposer(config: SpeculativeConfig) -> Proposer:
    if config.method in MODEL_METHODS:
        return ModelProposer(config.num_speculative_tokens, reads_states=config.method in HEAD_METHODS)
    if config.method == "grammar":
        return HostProposer(config.num_speculative_tokens, GrammarDrafter)
    budget = IndexBudget()
    if config.method == "ngram":
        return HostProposer(
            config.num_speculative_tokens,
            GrammarDrafter,
            lambda request: NgramDrafter(request, config.prompt_lookup_min, config.prompt_lookup_max, budget),
        )
    past = PastOutputs(config.suffix_decoding_max_cached_requests)
    return HostProposer(
        config.num_speculative_tokens,
        GrammarDrafter,
        lambda request: SuffixDrafter(request, config, past, budget),
        on_end=past.add,
    )
