"""The parameters of a request that pools."""

from __future__ import annotations

from typing import NamedTuple

from pagoda.errors import InvalidRequestError, shown

EMBED = "embed"
CLASSIFY = "classify"
SCORE = "score"
TOKEN_EMBED = "token_embed"
TOKEN_CLASSIFY = "token_classify"
POOLING_TASKS = (EMBED, CLASSIFY, SCORE, TOKEN_EMBED, TOKEN_CLASSIFY)


class PoolingParams(NamedTuple):
    """What is made of a prompt's hidden states; names and meaning are vLLM's.

    `task`: one of `POOLING_TASKS`. `normalize`: scale the vector to length 1; None: as the checkpoint's modules do.
    `dimensions`: keep so many of a vector's first numbers and scale them to length 1 (Kusupati et al., Matryoshka
    Representation Learning, 2022); None: all. `use_activation`: probabilities and not logits; None: as the model has it.
    `second_segment`: where the second text of a pair begins among the tokens, for models with token types; None: nowhere.

    A tuple on the wire: MessagePack tells it from `SamplingParams`, which is a map.
    """

    task: str = EMBED
    normalize: bool | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    second_segment: int | None = None

    @property
    def n(self) -> int:
        """Outputs of a prompt: one."""
        return 1

    @property
    def max_tokens(self) -> None:
        """Nothing is generated."""
        return

    @property
    def reads_all_tokens(self) -> bool:
        """Whether every token has an output of its own, so that none may come from the prefix cache."""
        return self.task in (TOKEN_EMBED, TOKEN_CLASSIFY)

    def checked(self, tasks: tuple[str, ...], size: int, allowed_dimensions: tuple[int, ...] = ()) -> PoolingParams:
        """Itself, if a model for `tasks` whose vectors have `size` numbers can do it.

        `allowed_dimensions`: those that the checkpoint names; empty: any. Raises `InvalidRequestError`.
        """
        if self.task not in tasks:
            raise InvalidRequestError(
                f"task {shown(self.task)} is not what this model is served for; it does {', '.join(tasks)}", "task"
            )
        if self.dimensions is None:
            return self
        if (
            isinstance(self.dimensions, bool)
            or not isinstance(self.dimensions, int)
            or not 1 <= self.dimensions <= size
        ):
            raise InvalidRequestError(
                f"dimensions must be an integer from 1 to {size}, got {shown(self.dimensions)}", "dimensions"
            )
        if allowed_dimensions and self.dimensions not in (*allowed_dimensions, size):
            allowed = ", ".join(map(str, allowed_dimensions))
            raise InvalidRequestError(
                f"dimensions={self.dimensions}: this model's vectors may be cut to {allowed}", "dimensions"
            )
        return self
