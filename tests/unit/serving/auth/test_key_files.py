"""Files of API keys: every form of them, what is refused and how, and that no message holds a key."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagoda.errors import ConfigError
from pagoda.serving.auth.key_files import MAX_FILE_BYTES, parse_contents, read_contents
from pagoda.serving.auth.keys import ApiKey, KeySet
from pagoda.serving.auth.scopes import Scope
from pagoda.tenants import TenantLimits

SECRET = "sk-0123456789abcdef"
OTHER = "sk-fedcba9876543210"


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def read(path: Path) -> KeySet:
    return parse_contents(path, read_contents(path))


def keys_in(tmp_path: Path, text: str | bytes, name: str = "keys") -> dict[str, ApiKey]:
    """The keys of a file by their names."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return {key.name: key for key in read(path)}


def problem_of(tmp_path: Path, text: str | bytes, name: str = "keys") -> str:
    with pytest.raises(ConfigError) as caught:
        keys_in(tmp_path, text, name)
    message = str(caught.value)
    assert SECRET not in message
    assert OTHER not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        f"{SECRET}\n{OTHER}\n",
        f"# two keys\r\n\r\n  {SECRET}\t\r\n{OTHER}",
        f"{SECRET},{OTHER}",
        f" {SECRET} , {OTHER} \n",
        f"sha256:{sha256(SECRET)}\n{OTHER}",
        f"\ufeff{SECRET}\n{OTHER}",
    ],
)
def test_plain_files_hold_a_key_a_line(tmp_path: Path, text: str) -> None:
    found = keys_in(tmp_path, text).values()
    assert [key.digest.hex() for key in found] == [sha256(SECRET), sha256(OTHER)]
    assert all(key.scopes == {Scope.INFER} and key.limits == TenantLimits() for key in found)
    assert len({key.tenant for key in found}) == 2


RECORDS: list[dict[str, Any]] = [
    {"name": "alice", "key": SECRET, "weight": 2, "requests_per_minute": 60, "tokens_per_minute": 1000},
    {"name": "ops", "sha256": sha256(OTHER), "scopes": ["read", "admin"], "tenant": "operators"},
]
YAML = f"""
# clients
- name: alice
  key: {SECRET}
  weight: 2
  requests_per_minute: 60
  tokens_per_minute: 1000
- {{name: ops, sha256: "{sha256(OTHER)}", scopes: [read, admin], tenant: operators}}
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keys", YAML),
        ("keys.yaml", YAML),
        ("keys.yaml", "keys:" + YAML),
        ("keys", "keys:" + YAML),
        ("keys", json.dumps(RECORDS)),
        ("keys.json", json.dumps({"keys": RECORDS}, indent=2)),
    ],
)
def test_records_say_what_a_key_is(tmp_path: Path, name: str, text: str) -> None:
    found = keys_in(tmp_path, text, name)
    assert found["alice"].limits == TenantLimits(weight=2.0, requests_per_minute=60, tokens_per_minute=1000)
    assert (found["alice"].scopes, found["alice"].tenant) == ({Scope.INFER}, "alice")
    assert (found["ops"].scopes, found["ops"].tenant) == ({Scope.READ, Scope.ADMIN}, "operators")
    assert found["ops"].digest.hex() == sha256(OTHER)


def test_a_key_of_a_mounted_secret_has_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "alice").write_text(SECRET + "\n")
    (tmp_path / "ops").write_text(json.dumps({"key": OTHER, "scopes": ["admin"]}))
    (tmp_path / "several").write_text("one-key,two-key")
    (tmp_path / ".hidden").write_text("three")
    (tmp_path / "directory").mkdir()
    found = {key.name: key for key in read(tmp_path)}
    assert found["alice"].digest.hex() == sha256(SECRET)
    assert (found["ops"].scopes, found["ops"].tenant) == ({Scope.ADMIN}, "ops")
    assert len(found) == 4


def test_a_volume_is_read_as_one_moment_has_it(tmp_path: Path) -> None:
    for moment in ("first", "second"):
        (tmp_path / f"..{moment}").mkdir()
        (tmp_path / f"..{moment}" / "alice").write_text(f"{SECRET}-{moment}")
    (tmp_path / "..data").symlink_to("..second")
    (tmp_path / "alice").symlink_to("..first/alice")  # what is seen while the links are swapped
    (key,) = read(tmp_path)
    assert key.digest.hex() == sha256(f"{SECRET}-second")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds no API key"),
        (" \n# nothing\n", "holds no API key"),
        ("[]", "holds no API key"),
        ("keys: []", "holds no API key"),
        ("keys:", "must be a list of records"),
        (f"{SECRET} {OTHER}", "line 1: a key must be 1 to 512 visible ASCII characters"),
        (f"{SECRET}\n{OTHER}é", "line 2: a key must be"),
        (f"{SECRET},,{OTHER}", "line 1: a key must be"),
        ("x" * 513, "line 1: a key must be"),
        ("sha256:abc", "64 hexadecimal digits"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (f"{SECRET}\n{SECRET}", "are the same key"),
        (f"- name: a\n  key: {SECRET}\n  sha256: {sha256(OTHER)}", "key 1: give either key or sha256"),
        ("- name: a", "key 1: give either key or sha256"),
        (f"- key: {SECRET}\n  scope: [read]", "key 1: has an unknown field; did you mean scopes?"),
        (f"- {SECRET}: {OTHER}", "key 1: has an unknown field"),
        (f"- key: {SECRET}\n  scopes: []", "some of infer, read, admin"),
        (f"- key: {SECRET}\n  scopes: [write]", "some of infer, read, admin"),
        (f"- key: {SECRET}\n  scopes: read", "must be a list"),
        ("- key: 1234567890", "must be strings: put what looks like a number into quotes"),
        (f"- key: {SECRET}\n  weight: 0", "weight must be a number greater than 0"),
        (f"- key: {SECRET}\n  weight: .nan", "weight must be a number greater than 0"),
        (f"- key: {SECRET}\n  weight: true", "weight must be a number greater than 0"),
        (f"- key: {SECRET}\n  requests_per_minute: 0", "requests_per_minute must be an integer of at least 1"),
        (f"- key: {SECRET}\n  tokens_per_minute: 1.5", "tokens_per_minute must be an integer of at least 1"),
        (f"- key: {SECRET}\n  name: ''", "name: must be 1 to 100 printable characters"),
        (f"- key: {SECRET}\n  tenant: 3", "tenant: must be 1 to 100 printable characters"),
        (f"- {{name: a, key: {SECRET}}}\n- {{name: a, key: {OTHER}}}", "the name a is given twice"),
        (f"- key: {SECRET}\n  key: {OTHER}", "key is given twice"),
        (
            f"- {{name: a, key: {SECRET}, tenant: t, weight: 2}}\n- {{name: b, key: {OTHER}, tenant: t}}",
            "a and b belong to the tenant t and give it different limits",
        ),
        (f"- key: {SECRET}\n - key", "is not YAML: line 2, column 2"),
        (f"- key: *{SECRET}", "is not YAML: line 1"),
        (f'[{{"key": "{SECRET}" "{OTHER}"}}]', "is not JSON: line 1"),
        ("[" * 100_000, "is not"),
        ("- " * 50_000, "is not YAML"),
        ("[1]", "key 1: must be a record"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_named(tmp_path: Path, text: str | bytes, named: str) -> None:
    assert named in problem_of(tmp_path, text)


def test_an_empty_directory_is_no_open_server(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text(SECRET)
    with pytest.raises(ConfigError, match="holds no API key"):
        read(tmp_path)


@pytest.mark.parametrize(
    "make", [lambda path: None, os.mkfifo, lambda path: path.write_bytes(b"x" * (MAX_FILE_BYTES + 1))]
)
def test_what_is_no_file_of_keys_is_refused_at_once(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "keys")
    with pytest.raises(ConfigError, match=r"keys (is no file|cannot be read|is larger)"):
        read(tmp_path / "keys")


def test_keys_of_one_tenant_may_agree(tmp_path: Path) -> None:
    found = keys_in(tmp_path, f"- {{name: a, key: {SECRET}, tenant: t}}\n- {{name: b, key: {OTHER}, tenant: t}}")
    assert found["a"].tenant == found["b"].tenant


@given(st.binary(max_size=60))
def test_any_bytes_are_keys_or_an_error(content: bytes) -> None:
    try:
        keys = parse_contents(Path("keys"), {"keys": content})
    except ConfigError:
        return
    assert len(keys) > 0


def test_a_key_is_found_by_itself_and_by_nothing_else(tmp_path: Path) -> None:
    keys = KeySet(keys_in(tmp_path, SECRET).values())
    assert keys.find(SECRET) is not None
    for other in ("", SECRET[:-1], SECRET + "x", SECRET.upper(), sha256(SECRET), f"sha256:{sha256(SECRET)}"):
        assert keys.find(other) is None
    assert SECRET not in repr(list(keys))
    assert sha256(SECRET)[:20] not in repr(list(keys))
