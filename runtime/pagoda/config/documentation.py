"""The page docs/configuration.md, written out of the schema: `python -m pagoda.config.documentation` prints it."""

from __future__ import annotations

from pagoda.config.command_line import default_text
from pagoda.config.environment import PREFIX
from pagoda.config.option import GROUPS
from pagoda.config.schema import options, rules

INTRODUCTION = """\
# Configuration

<!-- Generated from the schema by `make docs`; edit runtime/pagoda/config/schema.py instead. -->

There is one list of settings. Each may be given in four places; the first that gives it wins:

1. the command line: `--max-model-len 4096`, or `--max_model_len=4096`; dashes and underscores are the same. Given twice, the
   later counts; lists grow. Booleans: `--enable-prefix-caching`, `--no-enable-prefix-caching`,
   `--enable-prefix-caching=false`;
2. a file: `--config pagoda.yaml` (or `.json`), a flat mapping from names to values. `PAGODA_CONFIG` names it too;
3. the environment: `PAGODA_MAX_MODEL_LEN=4096`. An empty variable counts as not given;
4. the defaults below.

Sizes may be written with a unit, as in Kubernetes: `512MiB`, `2Gi`, `1.5GB`. `auto` leaves a value to be chosen at start,
which is then printed with the reason. Lists are separated by commas or written as JSON.

An unknown name, a wrong type, an impossible value or a contradiction is an error that names the setting, its value, where it
came from and what is allowed. All of them are reported together, before anything is loaded. `pagoda doctor` shows every
setting in effect with its source, `pagoda serve --help` this list.

Variables that Kubernetes itself makes for Services whose names begin with `pagoda` (`PAGODA_PORT=tcp://…`,
`PAGODA_SERVICE_HOST`, `PAGODA_PORT_8080_TCP_ADDR`, …) are ignored. Any other `PAGODA_…` that is no setting is an error.

From Python, `LLM(model=..., max_num_seqs=8)` takes the same names; files and the environment are not read there.
`pagoda.config.schema_json()` gives the JSON schema of the file.
"""


def configuration_page() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION]
    for group, title in GROUPS.items():
        parts.append(f"## {title}\n")
        for key, info in options().items():
            if info.group == group:
                parts.append(_setting(key))
    return "\n".join(parts)


def _setting(key: str) -> str:
    info = options()[key]
    default = f"default `{default_text(key)}`"
    names = [f"`--{key.replace('_', '-')}`", f"`{PREFIX}{key.upper()}`"]
    names += [f"also `--{alias.replace('_', '-')}`" for alias in info.aliases]
    unit = f" ({info.unit})" if info.unit else ""
    return f"### {key}\n\n{info.help}\n\n{', '.join(names)}; {default}; {rules().allowed_values(key)}{unit}.\n"


if __name__ == "__main__":
    print(configuration_page(), end="")
