"""What the commands that run the engine in this process share: arguments, loading the model, sampling options."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pagoda.cli.parser import CommandParser, settings_names
from pagoda.config.command_line import CONFIG_FILE, options_help, parse_command_line
from pagoda.config.rules import raise_problems
from pagoda.config.schema import PagodaConfig, is_hub_id
from pagoda.config.sources import load
from pagoda.errors import ConfigError, InvalidRequestError
from pagoda.models.checkpoint_source import checkpoint_directory
from pagoda.sampling.params import SamplingParams
from pagoda.serving.model_check import check_model
from pagoda.text.checkpoint_defaults import read_checkpoint_defaults

if TYPE_CHECKING:
    from pagoda.llm import LLM

_HELP_TAIL = (
    "Settings of the engine (--model, --dtype, --max-model-len, --seed, ...) are taken as by `pagoda serve`, from the command "
    "line, --config FILE and PAGODA_* variables; --help-settings lists them."
)


def make_parser(command: str, description: str) -> CommandParser:
    """A parser for a command's own options, beside which it takes the settings of the engine."""
    parser = CommandParser(prog=f"pagoda {command}", description=description, epilog=_HELP_TAIL, further=settings_names)
    parser.add_argument("--help-settings", action=_PrintSettings, nargs=0, help="list the settings of the engine")
    return parser


def add_model(parser: CommandParser) -> None:
    """The model as a word of its own, as in `pagoda serve MODEL`."""
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model MODEL")


def model_argument(own: argparse.Namespace) -> str | None:
    """The model that `add_model`'s word names."""
    return getattr(own, "model_argument", None)


def parse(
    parser: CommandParser,
    arguments: Sequence[str],
    model_of: Callable[[argparse.Namespace], str | None] = model_argument,
) -> tuple[argparse.Namespace, PagodaConfig]:
    """The command's own options and the configuration, out of one command line.

    `model_of`: takes the word that is the model out of the command's own, where --model does not give it.
    Raises `ConfigError` or `CheckpointError` for all that is wrong as far as small files of the checkpoint tell.
    """
    line = parse_command_line(arguments)
    own = parser.parse_args(line.others)
    raise_problems(line.problems)
    settings = [f"--{given.name}={given.raw}" for given in line.given]
    has_model = any(given.key == "model" for given in line.given)
    word = model_argument(own) if has_model else model_of(own)
    if word is not None and has_model:
        raise ConfigError(f"model: given twice, by --model and as {word}")
    if word is not None:
        settings.append(f"--model={word}")
    if line.config_file is not None:
        settings.append(f"--{CONFIG_FILE}={line.config_file}")
    config = load(settings).config
    check_model(config)
    return own, config


def is_model(word: str, *, is_followed: bool) -> bool:
    """Whether a word that may be a prompt names a model: a checkpoint here, something that is written as a path, or, where
    prompts follow it, OWNER/NAME.
    """
    is_checkpoint = word.endswith(".gguf") or os.path.isfile(os.path.join(word, "config.json"))
    if is_checkpoint or any(map(str.isspace, word)):
        return is_checkpoint
    if word.startswith(("/", "./", "../", "~/")):
        return True
    return is_followed and is_hub_id(word)


def sampling_params(config: PagodaConfig, own: argparse.Namespace, **further: Any) -> SamplingParams:
    """What the options ask for, then `further`, over what the checkpoint recommends; nothing is loaded for it.

    Raises `InvalidRequestError` naming what is impossible.
    """
    given = {name: value for name in _SAMPLING_NAMES if (value := getattr(own, name)) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in {**given, **further}.items()}
    directory = checkpoint_directory(
        config.model, config.revision, config.download_dir, gguf=config.quantization == "gguf"
    )
    recommended = read_checkpoint_defaults(replace(config, model=str(directory))).sampling
    try:
        return SamplingParams(**{**recommended, **given})
    except (TypeError, AttributeError) as error:  # what is no sequence where one is needed
        raise InvalidRequestError(f"the sampling parameters cannot be read: {error}") from error


def say_model(config: PagodaConfig) -> None:
    """Say on standard error which model runs."""
    print(f"model {config.model_description}", file=sys.stderr)


@contextmanager
def loaded_llm(config: PagodaConfig) -> Iterator[LLM]:
    """The model, loaded; said on standard error, with the stage on a terminal meanwhile."""
    say_model(config)
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


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """One option for each sampling parameter."""
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


def sampling_names() -> tuple[str, ...]:
    """The sampling parameters that options set."""
    return _SAMPLING_NAMES


def check_one_choice(sampling: SamplingParams, why: str) -> None:
    """Raise `InvalidRequestError` for more than one completion where only one can be shown."""
    if sampling.n != 1:
        raise InvalidRequestError(f"n={sampling.n}: {why}", "n")
