"""What `pagoda generate` and `pagoda chat` share: their arguments, loading the model, and sampling options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pagoda.config.command_line import CONFIG_FILE, options_help, parse_command_line
from pagoda.config.rules import raise_problems
from pagoda.config.schema import PagodaConfig
from pagoda.config.sources import load
from pagoda.errors import InvalidRequestError
from pagoda.sampling.params import SamplingParams

if TYPE_CHECKING:
    from pagoda.llm import LLM

_HELP_TAIL = (
    "Settings of the engine (--model, --dtype, --max-model-len, --seed, ...) are taken as by `pagoda serve`, from the command "
    "line, --config FILE and PAGODA_* variables; --help-settings lists them."
)


def make_parser(command: str, description: str) -> argparse.ArgumentParser:
    """A parser for a command's own options, the sampling options among them."""
    parser = argparse.ArgumentParser(
        prog=f"pagoda {command}", description=description, epilog=_HELP_TAIL, allow_abbrev=False
    )
    parser.add_argument("--help-settings", action=_PrintSettings, nargs=0, help="list the settings of the engine")
    _add_sampling_options(parser)
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, PagodaConfig]:
    """The command's own options and the configuration, out of one command line.

    Raises `ConfigError` for wrong settings; own options that are wrong end the program, as argparse does.
    """
    line = parse_command_line(arguments)
    own = parser.parse_args([_with_dashes(word) for word in line.others])
    raise_problems(line.problems)
    settings = [f"--{given.name}={given.raw}" for given in line.given]
    if line.config_file is not None:
        settings.append(f"--{CONFIG_FILE}={line.config_file}")
    return own, load(settings).config


def sampling_params(llm: LLM, own: argparse.Namespace, **further: Any) -> SamplingParams:
    """What the options ask for, then `further`, over what the checkpoint recommends.

    Raises `InvalidRequestError` naming what is impossible.
    """
    given = {name: value for name in _SAMPLING_NAMES if (value := getattr(own, name)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in {**given, **further}.items()}
    try:
        return llm.default_sampling_params(**given)
    except (TypeError, AttributeError) as error:  # what is no sequence where one is needed
        raise InvalidRequestError(f"the sampling parameters cannot be read: {error}") from error


@contextmanager
def loaded_llm(config: PagodaConfig) -> Iterator[LLM]:
    """The model, loaded; on a terminal the stage is shown on standard error meanwhile."""
    with _loading_display() as on_phase:
        from pagoda.llm import LLM

        llm = LLM.from_config(config, on_phase)
    with llm:
        yield llm


@contextmanager
def _loading_display() -> Iterator[Callable[[str, str], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status("loading") as status:
        yield lambda name, detail: status.update(f"loading: {name} {detail}")


class _PrintSettings(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        print(options_help(), end="")
        parser.exit()


def _with_dashes(word: str) -> str:
    """An option's name with dashes, its value untouched: underscores are as good everywhere in Pagoda."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and len(name) > 2 else word


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "without an option: what the checkpoint recommends")
    for name, (kind, text) in _NUMBERS.items():
        group.add_argument(_flag(name), type=kind, metavar=kind.__name__.upper(), help=text)
    for name, text in _TEXTS.items():
        group.add_argument(_flag(name), action="append", metavar="TEXT", help=f"{text}; may be given several times")
    for name, text in _ID_LISTS.items():
        group.add_argument(_flag(name), type=_token_ids, metavar="ID[,ID...]", help=text)
    group.add_argument("--logit-bias", type=_logit_bias, metavar="ID:BIAS[,...]", help="added to these logits")
    for name, text in _SWITCHES.items():
        group.add_argument(_flag(name), action=argparse.BooleanOptionalAction, help=text)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _token_ids(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _logit_bias(text: str) -> dict[int, float]:
    pairs = (word.split(":") for word in text.split(","))
    return {int(token_id): float(bias) for token_id, bias in pairs}


_NUMBERS: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens to generate; default: what fits the context"),
    "min_tokens": (int, "tokens before which nothing ends a completion"),
    "temperature": (float, "0: always the most probable token"),
    "top_k": (int, "sample from this many tokens; 0: from all"),
    "top_p": (float, "sample from the tokens that have this much probability together"),
    "min_p": (float, "sample from tokens at least this probable, relative to the most probable"),
    "repetition_penalty": (float, "above 1: tokens seen before are less likely"),
    "presence_penalty": (float, "subtracted from logits of tokens generated before"),
    "frequency_penalty": (float, "the same, for each time that they were generated"),
    "n": (int, "completions of each prompt"),
    "logprobs": (int, "log-probabilities of this many candidates at each token"),
    "prompt_logprobs": (int, "the same for the prompt"),
}
_TEXTS = {"stop": "end before this text", "bad_words": "never generate this word"}
_ID_LISTS = {"stop_token_ids": "end at one of these tokens", "allowed_token_ids": "generate only these tokens"}
_SWITCHES = {
    "ignore_eos": "go on after an end-of-sequence token",
    "include_stop_str_in_output": "keep the stop string in the text",
    "skip_special_tokens": "leave special tokens out of the text (the default)",
}
_SAMPLING_NAMES = (*_NUMBERS, *_TEXTS, *_ID_LISTS, "logit_bias", *_SWITCHES)


def check_one_choice(sampling: SamplingParams, why: str) -> None:
    """Raise `InvalidRequestError` for more than one completion where only one can be shown."""
    if sampling.n != 1:
        raise InvalidRequestError(f"n={sampling.n}: {why}", "n")
