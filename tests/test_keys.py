"""Keys from a file or a mounted Secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigtrain.config import UserError
from bigtrain.keys import load_secrets, read_secrets

CANARY = "canary-5f1d"


def test_keys_come_from_lines_and_do_not_replace_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "secrets"
    path.write_text(f"# of the team\nexport WANDB_API_KEY={CANARY}\nHF_TOKEN = 'b=c'\n\n")
    path.chmod(0o600)
    environment = {"BIGTRAIN_SECRETS_FILE": str(path), "HF_TOKEN": "mine"}
    load_secrets(environment)
    assert (environment["WANDB_API_KEY"], environment["HF_TOKEN"]) == (CANARY, "mine")
    assert read_secrets(path)["HF_TOKEN"] == "b=c"


def test_keys_come_from_a_mounted_secret(tmp_path: Path) -> None:
    # As Kubernetes lays it out: the files are links into a hidden directory.
    data = tmp_path / "..2026" / "WANDB_API_KEY"
    data.parent.mkdir()
    data.write_text(f"{CANARY}\n")
    data.chmod(0o440)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "WANDB_API_KEY").symlink_to("..data/WANDB_API_KEY")
    assert read_secrets(tmp_path) == {"WANDB_API_KEY": CANARY}


@pytest.mark.parametrize(("text", "mode"), [(f"KEY={CANARY}", 0o644), (f"KEY={CANARY}", 0o640), (CANARY, 0o600)])
def test_errors_do_not_show_the_secret(tmp_path: Path, text: str, mode: int) -> None:
    path = tmp_path / "secrets"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(UserError) as error:
        read_secrets(path)
    assert CANARY not in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_secrets({"BIGTRAIN_SECRETS_FILE": str(tmp_path / "none")})
