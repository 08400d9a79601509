"""The keys in force: whom they admit, how they change with their file, and what becomes of a file that cannot be used."""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytest

from pagoda.errors import AuthenticationError, ConfigError, PermissionDeniedError
from pagoda.serving.auth.api_keys import REMIND_SECONDS, ApiKeys, caller_var
from pagoda.serving.auth.attempts import MAX_DELAY_SECONDS, TooManyAttemptsError
from pagoda.serving.auth.keys import ApiKey
from pagoda.serving.auth.scopes import Access, Scope

FILE = """
- {name: alice, key: key-of-alice}
- {name: scraper, key: key-of-scraper, scopes: [read]}
- {name: ops, key: key-of-ops, scopes: [read, admin]}
"""
GUARDED = (Access.ANY_KEY, Access.INFER, Access.READ, Access.ADMIN)


class Time:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


def make(file: Path | None = None, keys: tuple[str, ...] = (), *scopes: Scope, time: Time | None = None) -> ApiKeys:
    time = time or Time()
    return ApiKeys(keys, file, frozenset(scopes), sleep=time.sleep, clock=time)


def admit(keys: ApiKeys, access: Access, key: str | None, peer: str = "10.0.0.1") -> ApiKey:
    async def run() -> ApiKey:
        caller = await keys.admit(access, None if key is None else f"Bearer {key}", peer)
        assert caller_var.get() is caller
        return caller

    return asyncio.run(run())


def admitted(keys: ApiKeys, key: str | None) -> set[Access]:
    """What the sender of a key gets."""
    found = set()
    for access in Access:
        try:
            admit(keys, access, key)
            found.add(access)
        except (AuthenticationError, PermissionDeniedError):
            continue
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(FILE)
    return path


def test_a_key_gets_what_its_scopes_say_and_no_more(file: Path) -> None:
    keys = make(file, ("key-of-the-settings",))
    assert admitted(keys, "key-of-alice") == {Access.PUBLIC, Access.ANY_KEY, Access.INFER}
    assert admitted(keys, "key-of-the-settings") == {Access.PUBLIC, Access.ANY_KEY, Access.INFER}
    assert admitted(keys, "key-of-scraper") == {Access.PUBLIC, Access.ANY_KEY, Access.READ}
    assert admitted(keys, "key-of-ops") == {Access.PUBLIC, Access.ANY_KEY, Access.READ, Access.ADMIN}
    assert admitted(keys, "key-of-nobody") == admitted(keys, None) == {Access.PUBLIC}


def test_a_missing_scope_is_named_and_a_known_key_is_not_slowed_down(file: Path) -> None:
    time = Time()
    keys = make(file, time=time)
    for _ in range(20):
        with pytest.raises(PermissionDeniedError, match="scope `admin`"):
            admit(keys, Access.ADMIN, "key-of-alice")
    assert not any(time.slept)


def test_without_keys_everybody_may_do_everything() -> None:
    assert admitted(make(), None) == admitted(make(), "whatever") == set(Access)


def test_anonymous_scopes_are_for_those_without_a_key(file: Path) -> None:
    keys = make(file, (), Scope.READ)
    assert admitted(keys, None) == {Access.PUBLIC, Access.ANY_KEY, Access.READ}
    assert admitted(keys, "key-of-nobody") == {Access.PUBLIC}
    assert admitted(keys, "key-of-alice") == {Access.PUBLIC, Access.ANY_KEY, Access.INFER}


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic a2V5", "key-of-alice"])
def test_no_key_is_told_what_to_send_at_once(file: Path, header: str | None) -> None:
    time = Time()
    keys = make(file, time=time)
    for _ in range(20):
        with pytest.raises(AuthenticationError, match="Authorization: Bearer <key>"):
            asyncio.run(keys.admit(Access.INFER, header, "10.0.0.1"))
    assert not time.slept


def guess_on(keys: ApiKeys) -> None:
    for index in range(100):
        with suppress(AuthenticationError):
            admit(keys, Access.INFER, f"guess-{index}")


def test_unknown_keys_wait_and_the_same_peers_good_key_does_not(file: Path) -> None:
    time = Time()
    keys = make(file, time=time)
    with pytest.raises(AuthenticationError, match="not known"):
        admit(keys, Access.INFER, "guess")
    with pytest.raises(TooManyAttemptsError):
        guess_on(keys)
    assert max(time.slept) <= MAX_DELAY_SECONDS
    assert sum(time.slept) > MAX_DELAY_SECONDS
    before = len(time.slept)
    assert admit(keys, Access.INFER, "key-of-alice").name == "alice"
    assert admit(keys, Access.PUBLIC, "guess").name == "anonymous"
    assert len(time.slept) == before


def test_a_changed_file_is_in_force_and_names_are_tenants(file: Path) -> None:
    keys = make(file)
    tenant = admit(keys, Access.INFER, "key-of-alice").tenant
    keys.reload()
    assert admit(keys, Access.INFER, "key-of-alice").tenant == tenant
    file.write_text("- {name: alice, key: new-key-of-alice}")
    keys.reload()
    assert admit(keys, Access.INFER, "new-key-of-alice").tenant == tenant
    assert admitted(keys, "key-of-alice") == {Access.PUBLIC}


def swap(volume: Path, moment: str, content: str) -> None:
    """What the kubelet does with the volume of a Secret that has changed."""
    (volume / f"..{moment}").mkdir()
    (volume / f"..{moment}" / "clients").write_text(content)
    link = volume / "..data_tmp"
    link.symlink_to(f"..{moment}")
    link.rename(volume / "..data")
    if not (volume / "clients").is_symlink():
        (volume / "clients").symlink_to("..data/clients")


@pytest.mark.parametrize("name", [".", "clients"])
def test_a_secret_that_changes_in_its_volume_is_read_again(tmp_path: Path, name: str) -> None:
    swap(tmp_path, "first", "first-key-of-clients")
    keys = make(tmp_path / name)
    admit(keys, Access.INFER, "first-key-of-clients")
    swap(tmp_path, "second", "other-key-of-clients")  # of the same length
    times = (tmp_path / "..first" / "clients").stat()
    os.utime(tmp_path / "..second" / "clients", ns=(times.st_atime_ns, times.st_mtime_ns))
    keys.reload()
    admit(keys, Access.INFER, "other-key-of-clients")
    assert admitted(keys, "first-key-of-clients") == {Access.PUBLIC}


@pytest.mark.parametrize("broken", ["", "- key: key-of-mallory\n  scopes: [everything]", "key of mallory", None])
def test_a_file_that_broke_keeps_the_keys_and_says_so(
    file: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    time = Time()
    keys = make(file, time=time)
    assert keys.file is not None
    assert keys.file.is_current
    file.unlink()
    if broken is not None:
        file.write_text(broken)
    for _ in range(3):
        keys.reload()
    assert not keys.file.is_current
    (record,) = (record for record in caplog.records if record.levelno == logging.ERROR)
    assert "the 3 keys that were in force stay in force" in record.getMessage()
    assert "mallory" not in caplog.text
    time.now += REMIND_SECONDS
    keys.reload()
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2
    assert admit(keys, Access.INFER, "key-of-alice").name == "alice"
    file.write_text(FILE)
    keys.reload()
    assert keys.file.is_current


def test_a_file_that_contradicts_the_settings_is_no_change(file: Path) -> None:
    keys = make(file, ("key-of-the-settings",))
    file.write_text("key-of-the-settings\nkey-of-mallory")
    for _ in range(2):
        keys.reload()
        assert keys.file is not None
        assert not keys.file.is_current
        assert admitted(keys, "key-of-mallory") == {Access.PUBLIC}


def test_a_stream_ends_with_the_key_that_opened_it(file: Path) -> None:
    keys = make(file)

    async def run() -> None:
        await keys.admit(Access.INFER, "Bearer key-of-alice", "10.0.0.1")
        keys.check_again(Access.INFER)
        file.write_text(FILE.replace("key-of-alice", "key-of-alice, scopes: [read]"))
        keys.reload()
        with pytest.raises(PermissionDeniedError):
            keys.check_again(Access.INFER)
        file.write_text("- {name: alice, key: another-key}")
        keys.reload()
        with pytest.raises(AuthenticationError):
            keys.check_again(Access.INFER)

    asyncio.run(run())


def test_a_file_without_keys_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n")
    with pytest.raises(ConfigError, match="holds no API key"):
        make(tmp_path / "keys")


def test_an_open_server_says_so(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    make().log_state("0.0.0.0:8080")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no API keys: whoever reaches 0.0.0.0:8080" in record.getMessage()
    caplog.clear()
    caplog.set_level(logging.INFO)
    make(file).log_state("0.0.0.0:8080")
    assert "3 are in force (1 with infer, 2 with read, 1 with admin)" in caplog.text
