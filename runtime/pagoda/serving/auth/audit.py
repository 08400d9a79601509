"""One line in the log for each call that needs the scope `admin`, whatever became of it: what, who, from where, outcome."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pagoda.logs import AUDIT_LOGGER
from pagoda.serving.auth.api_keys import caller_var
from pagoda.serving.auth.keys import ANONYMOUS
from pagoda.serving.auth.scopes import Access

logger = logging.getLogger(AUDIT_LOGGER)

MAX_ACTION_CHARACTERS = 200


@contextmanager
def recorded(access: Access, action: str, peer: str, outcome: Callable[[], object]) -> Iterator[None]:
    """Log the call inside the block if it is one for administrators. `outcome` gives its status afterwards."""
    if access is not Access.ADMIN:
        yield
        return
    caller_var.set(ANONYMOUS)  # until a key is found
    try:
        yield
    finally:
        logger.info(
            "%s by %s from %s: %s",
            action[:MAX_ACTION_CHARACTERS],
            caller_var.get().name,
            peer or "?",
            outcome() or "aborted",
        )
