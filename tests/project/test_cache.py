"""The cache folder: where it is, what is whole, and what goes when there is too much."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from graphopt import cache

KEY = cache.key_of("a", "b")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_entry_is_what_was_kept(place: Path) -> None:
    assert cache.find("kind", KEY) is None
    cache.keep("kind", KEY, b"one\ntwo")
    assert cache.find("kind", KEY) == b"one\ntwo"
    assert cache.find("other", KEY) is None
    cache.keep("kind", KEY, b"")
    assert cache.find("kind", KEY) == b""
    assert [p.name for p in (place / "kind").iterdir()] == [KEY], "a temporary file is left"
    cache.discard("kind", KEY)
    assert cache.find("kind", KEY) is None


def test_keys_tell_apart_where_a_part_ends() -> None:
    assert cache.key_of("a", "b") != cache.key_of("ab") != cache.key_of("ab", "")


def test_keys_are_no_paths(place: Path) -> None:
    cache.keep("kind", "../outside", b"x")
    assert not place.exists()


def test_damage_is_seen_and_removed(place: Path) -> None:
    cache.keep("kind", KEY, b"content")
    path = place / "kind" / KEY
    path.write_bytes(path.read_bytes()[:-1])
    assert cache.find("kind", KEY) is None
    assert not path.exists()


def test_least_recently_used_entries_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [cache.key_of(str(n)) for n in range(5)]
    for number, key in enumerate(keys):
        cache.keep("kind", key, bytes(1000))
        os.utime(place / "kind" / key, (1e9 + number, 1e9 + number))
    assert cache.find("kind", keys[0]) is not None, "used again"
    monkeypatch.setattr(cache, "MOST_ENTRIES", 3)
    cache.keep("kind", KEY, b"new")
    assert {p.name for p in (place / "kind").iterdir()} == {KEY, keys[0], keys[4]}
    monkeypatch.setattr(cache, "MOST_BYTES", 2000)
    cache.keep("other", KEY, b"newer")
    assert {p.name for p in place.rglob("*") if p.is_file()} == {KEY, keys[0]}
    cache.keep("kind", keys[1], bytes(600))
    assert not (place / "kind" / keys[1]).exists(), "one entry takes more than a quarter of the cache"


def test_what_a_killed_process_left_is_removed(place: Path) -> None:
    cache.keep("kind", KEY, b"x")
    old, new = (place / "kind" / f".{KEY}.{n}.partial" for n in (1, 2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 1e6,) * 2)
    cache.keep("kind", KEY, b"y")
    assert not old.exists()
    assert new.exists(), "another process is writing it"


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in ("off", "OFF", "0", "none", "false", "no"):
        monkeypatch.setenv("GRAPHOPT_CACHE", setting)
        assert cache.folder() is None
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "graphopt"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "graphopt"
    with cache.without_cache():
        assert cache.folder() is None
    assert cache.folder() is not None


def test_a_folder_that_others_write_to_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "graphopt").mkdir()
    (tmp_path / "graphopt").chmod(0o777)
    assert cache.folder() is None
    (tmp_path / "graphopt").chmod(0o755)
    assert cache.folder() is not None


def test_new_folders_are_the_users_own(place: Path) -> None:
    cache.keep("kind", KEY, b"x")
    assert place.stat().st_mode & 0o777 == 0o700
