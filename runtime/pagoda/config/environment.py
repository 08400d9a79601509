"""The settings in the environment: `PAGODA_MAX_MODEL_LEN=4096`.

Kubernetes describes every Service of a namespace to every pod in variables of its own. A Service named `pagoda` or
`pagoda-head` makes it set `PAGODA_PORT=tcp://10.0.0.1:80`, `PAGODA_HEAD_SERVICE_HOST` and the like, which are no settings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pagoda.config.names import Given, nearest, settings_by_name
from pagoda.config.rules import Problem
from pagoda.config.schema import options
from pagoda.config.vllm_flags import as_written_for_vllm

PREFIX = "PAGODA_"
CONFIG_FILE_VARIABLE = "PAGODA_CONFIG"
CLIENT_KEY_VARIABLE = "PAGODA_ADMIN_KEY"
"""The key with which commands ask a running server; no setting of one."""
EMPTY = "is empty, which would leave the server open to everybody: unset it if that is meant"
# Variables of vLLM that somebody who changes from it relies on. A key that is not asked for would leave the server open.
_OF_VLLM = {"VLLM_API_KEY": "api_keys", "VLLM_LOGGING_LEVEL": "log_level"}
_SERVICE_NAME = re.compile(
    r"PAGODA(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(ADDR|PROTO|PORT))?)"
)
_SERVICE_PORT_NAME = re.compile(r"PAGODA(_\w+)?_PORT")
_SERVICE_PORT_VALUE = re.compile(r"(tcp|udp|sctp)://\S*", re.IGNORECASE)


def is_from_kubernetes(name: str, value: str) -> bool:
    """Whether a variable is one that Kubernetes makes for a Service whose name begins with `pagoda`."""
    if _SERVICE_NAME.fullmatch(name):
        return True
    return bool(_SERVICE_PORT_NAME.fullmatch(name) and _SERVICE_PORT_VALUE.fullmatch(value))


def read_environment(environ: Mapping[str, str]) -> tuple[list[Given], list[Problem]]:
    """Settings of the environment and a problem for every `PAGODA_…` that is none.

    An empty variable counts as not given: a chart writes one for a value that is not set. What `guards` must not be
    empty.
    """
    given, problems = [], []
    for variable, name in _OF_VLLM.items():
        value = environ.get(variable, "")
        if variable in environ and not value and options()[name].guards:
            problems.append(Problem(variable, "", EMPTY, "environment"))
        elif value and not environ.get(PREFIX + name.upper()):
            raw = [value] if name == "api_keys" else as_written_for_vllm(name, value)
            given.append(Given(name, raw, f"environment {variable}"))
    for variable, value in sorted(environ.items()):
        if not variable.startswith(PREFIX) or variable in (CONFIG_FILE_VARIABLE, CLIENT_KEY_VARIABLE):
            continue
        if not value:
            key = settings_by_name().get(variable.removeprefix(PREFIX).lower())
            if key is not None and options()[key].guards:
                problems.append(Problem(variable, "", EMPTY, "environment"))
            continue
        if is_from_kubernetes(variable, value):
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in settings_by_name():
            given.append(Given(name, value, f"environment {variable}"))
        else:
            known = [PREFIX + setting.upper() for setting in settings_by_name()]
            problems.append(Problem(variable, "", "unknown setting" + nearest(variable, known), "environment"))
    return given, problems
