"""The token of a Ray cluster: whoever has it may run code on every node, and whoever does not is refused. Imports no Ray.

It comes from RAY_AUTH_TOKEN, from the file that RAY_AUTH_TOKEN_PATH names, or from Ray's own file, ~/.ray/auth_token, as
`ray get-auth-token` writes it. A head that is given none makes one there. RAY_AUTH_MODE=disabled turns it off.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pagoda.distributed.private_directory import default_directory, make_private
from pagoda.errors import ConfigError

MODE, TOKEN, PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
OPEN = "no token (RAY_AUTH_MODE=disabled): whoever reaches its ports runs code on every node"
UNKNOWN = "this machine has no token: a cluster that asks for none lets whoever reaches its ports run code"

_TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class RayAuthentication:
    """`environment`: the variables to add for Ray. `source`: where the token is from; empty without one. Printed in words."""

    environment: Mapping[str, str] = field(repr=False)
    source: str = ""
    words: str = ""

    def __str__(self) -> str:
        return self.words or f"authenticated by the token in {self.source}"

    @property
    def has_token(self) -> bool:
        return bool(self.source)

    @property
    def is_disabled(self) -> bool:
        """Whether it was turned off, and not only not given."""
        return self.words == OPEN

    @classmethod
    def of_member(cls, environ: Mapping[str, str]) -> RayAuthentication:
        """Of a machine that joins a cluster or connects to it. Raises `ConfigError` for a token that cannot be used."""
        found = _given(environ)
        return found or cls({}, words=UNKNOWN)

    @classmethod
    def of_head(cls, environ: Mapping[str, str]) -> RayAuthentication:
        """Of a head that is started here; a token is made where there is none. Raises `ConfigError` as `of_member`."""
        found = _given(environ)
        return found or _of_file(_make_token(environ), environ)


def _given(environ: Mapping[str, str]) -> RayAuthentication | None:
    mode = environ.get(MODE, "token").lower()
    if mode == "disabled":
        return RayAuthentication({}, words=OPEN)
    if mode != "token":
        raise ConfigError(f"{MODE}={environ[MODE]}: must be token or disabled")
    for variable in (TOKEN, PATH):
        # What Kubernetes makes of an empty Secret must not open the cluster.
        if variable in environ and not environ[variable].strip():
            raise ConfigError(f"{variable} is empty; unset it, or set it to the cluster's token")
    if TOKEN in environ:
        return RayAuthentication({MODE: "token"}, TOKEN)
    if PATH in environ:
        return _of_file(Path(environ[PATH]), environ)
    return _of_file(_own_file(environ), environ) if _own_file(environ).is_file() else None


def _of_file(path: Path, environ: Mapping[str, str]) -> RayAuthentication:
    try:
        is_empty = not path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise ConfigError(f"the Ray token in {path} cannot be read: {error.strerror}") from error
    if is_empty:
        raise ConfigError(f"the Ray token in {path} is empty")
    return RayAuthentication({MODE: "token", PATH: str(path)}, str(path))


def _make_token(environ: Mapping[str, str]) -> Path:
    """A new token in Ray's own file, or in the directory of this user's nodes where there is no home to write to."""
    try:
        path = _own_file(environ)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return _write_once(path)
    except OSError:
        return _write_once(make_private(default_directory()) / "ray_auth_token")


def _write_once(path: Path) -> Path:
    """Write a token for this user alone, unless another process has just done so."""
    # Not the process id: that of another container with the same home may be the same.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600), "w") as file:
        file.write(secrets.token_hex(_TOKEN_BYTES))
    try:
        os.link(unfinished, path)  # which fails where one is there
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()
    return path


def _own_file(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME", "/"), ".ray", "auth_token")
