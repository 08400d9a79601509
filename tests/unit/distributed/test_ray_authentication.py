"""Where the token of a Ray cluster comes from, that a head always has one, and what an empty one is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pagoda.distributed.private_directory import default_directory, make_private, trouble_with_directory
from pagoda.distributed.ray.authentication import RayAuthentication
from pagoda.distributed.ray.node import ray_environment
from pagoda.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_a_head_without_a_token_makes_one_that_it_finds_again(home: Path) -> None:
    environ = {"HOME": str(home)}
    with ThreadPoolExecutor(8) as pool:  # replicas start at the same time
        made = list(pool.map(lambda _: RayAuthentication.of_head(environ).source, range(32)))
    assert set(made) == {str(home / ".ray" / "auth_token")}
    path = Path(made[0])
    assert len(path.read_text()) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]
    added = ray_environment(environ, RayAuthentication.of_head(environ))
    assert (added["RAY_AUTH_MODE"], added["RAY_AUTH_TOKEN_PATH"]) == ("token", str(path))


def test_a_head_without_a_home_keeps_its_token_where_only_this_user_looks(home: Path) -> None:
    source = RayAuthentication.of_head({"HOME": "/proc/1"}).source
    assert Path(source).parent == default_directory()
    assert default_directory().stat().st_mode & 0o777 == 0o700
    assert RayAuthentication.of_head({"HOME": "/proc/1"}).source == source


def test_a_token_that_is_given_is_taken(home: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t" * 32)
    for environ in ({"RAY_AUTH_TOKEN": "t" * 32}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        environ = {**environ, "HOME": str(home)}
        for find in (RayAuthentication.of_head, RayAuthentication.of_member):
            added = ray_environment(environ, find(environ))
            assert added["RAY_AUTH_MODE"] == "token"
            assert "t" * 32 not in f"{find(environ)} {find(environ)!r}"
    assert not (home / ".ray").exists()


def test_the_token_that_ray_keeps_in_the_home_directory_turns_authentication_on(home: Path) -> None:
    """`ray start` takes it by itself: a driver that does not would be refused by its own head."""
    assert "RAY_AUTH_MODE" not in ray_environment({"HOME": str(home)})
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("t")
    assert ray_environment({"HOME": str(home)})["RAY_AUTH_MODE"] == "token"


def test_authentication_is_turned_off_by_its_own_variable_only(home: Path) -> None:
    environ = {"HOME": str(home), "RAY_AUTH_MODE": "disabled"}
    assert not RayAuthentication.of_head(environ).has_token
    assert "whoever reaches its ports runs code" in str(RayAuthentication.of_head(environ))
    assert ray_environment(environ)["RAY_AUTH_MODE"] == "disabled"
    member = RayAuthentication.of_member({"HOME": str(home)})
    assert not member.has_token
    assert "no token" in str(member)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"RAY_AUTH_TOKEN": ""}, "RAY_AUTH_TOKEN is empty"),
        ({"RAY_AUTH_TOKEN": " \n"}, "RAY_AUTH_TOKEN is empty"),
        ({"RAY_AUTH_TOKEN_PATH": ""}, "RAY_AUTH_TOKEN_PATH is empty"),
        ({"RAY_AUTH_TOKEN_PATH": "/does/not/exist"}, "/does/not/exist cannot be read"),
        ({"RAY_AUTH_TOKEN_PATH": "/dev/null"}, "/dev/null is empty"),
        ({"RAY_AUTH_MODE": "none"}, "RAY_AUTH_MODE=none: must be token or disabled"),
    ],
)
def test_a_token_that_is_none_opens_nothing(environ: dict[str, str], named: str) -> None:
    for find in (RayAuthentication.of_head, RayAuthentication.of_member):
        with pytest.raises(ConfigError, match=named):
            find(environ)


def test_a_directory_is_believed_only_if_it_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = make_private(tmp_path / "ours")
    assert ours.stat().st_mode & 0o777 == 0o700
    ours.chmod(0o755)
    assert make_private(ours).stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(ours)
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, words in (("link", "a link or a file"), ("open", "can be written by other users")):
        assert words in (trouble_with_directory(tmp_path / name) or "")
        with pytest.raises(ConfigError, match=words):
            make_private(tmp_path / name)
    assert "a link or a file" in (trouble_with_directory(tmp_path / "file") or "")
    assert trouble_with_directory(tmp_path / "none") is None
    monkeypatch.setattr("os.getuid", lambda: 4711)
    with pytest.raises(ConfigError, match="belongs to the user"):
        make_private(ours)
