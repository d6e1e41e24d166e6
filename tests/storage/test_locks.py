"""Locks hold between processes and end with their holder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bigtrain.storage.locks import lock, locked


def opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY)


def test_a_lock_keeps_others_out_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    assert lock(first, wait=False)
    assert not lock(second, wait=False)
    assert not lock(second, shared=True, wait=False)
    os.close(first)
    assert lock(second, wait=False)
    os.close(second)


def test_shared_holders_share(tmp_path: Path) -> None:
    first, second = opened(tmp_path), opened(tmp_path)
    assert lock(first, shared=True)
    assert lock(second, shared=True, wait=False)
    os.close(first)
    os.close(second)


def test_an_error_releases_the_lock_and_a_missing_file_is_made_on_request_only(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with pytest.raises(FileNotFoundError), locked(file):
        pass
    with pytest.raises(KeyError), locked(file, make=True):
        raise KeyError
    descriptor = opened(file)
    assert lock(descriptor, wait=False)
    os.close(descriptor)
