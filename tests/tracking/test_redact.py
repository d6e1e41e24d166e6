from __future__ import annotations

import pytest

from bigtrain.tracking.redact import REDACTED, is_secret_key, redact, redact_text, redact_url, redact_yaml

CANARY = "canary-7f3a"


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "WANDB_API_KEY",
        "hfToken",
        "HF_TOKEN",
        "client-secret",
        "AWS_SECRET_ACCESS_KEY",
        "dbPassword",
        "apikey",
    ],
)
def test_secret_keys(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize("key", ["tokens", "tokenizer", "tokens_per_s", "batch", "train_tokens", "monkey", "lr"])
def test_harmless_keys(key: str) -> None:
    assert not is_secret_key(key)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"s3://user:{CANARY}@bucket/train", f"s3://{REDACTED}@bucket/train"),
        (f"https://{CANARY}@host:8080/x", f"https://{REDACTED}@host:8080/x"),
        (f"https://h/x?X-Amz-Date=1&X-Amz-Signature={CANARY}", f"https://h/x?{REDACTED}"),
        (f"https://h/x?sv=1&sig={CANARY}", f"https://h/x?{REDACTED}"),
        (f"https://h/x?access_token={CANARY}", f"https://h/x?{REDACTED}"),
        (f"https://h/x#access_token={CANARY}", f"https://h/x#{REDACTED}"),
        ("https://h/x?page=2", "https://h/x?page=2"),
    ],
)
def test_urls_lose_user_info_and_signatures_and_nothing_else(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_text(f"see '{url}', then go on") == f"see '{shown}', then go on"


def test_assignments_and_bearers_in_texts_are_redacted() -> None:
    text = f"run --hf-token={CANARY} WANDB_API_KEY={CANARY} with 'Authorization: Bearer {CANARY}' and lr=0.1"
    assert CANARY not in redact_text(text)
    assert "lr=0.1" in redact_text(text)


def test_nested_values_keep_their_shape_and_lose_their_secrets() -> None:
    config = {
        "optimizer": {"lr": 1e-3, "betas": (0.9, 0.99)},
        "job": {"env": [{"HF_TOKEN": CANARY}], "secrets": {"a": CANARY}, "password": None, "use_key": True},
        "data": {"train": [f"https://u:{CANARY}@h/x"]},
    }
    shown = redact(config)
    assert CANARY not in str(shown)
    assert shown["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.99]}
    assert shown["job"]["password"] is None
    assert shown["job"]["use_key"] is True


def test_yaml_text_keeps_all_but_its_secrets() -> None:
    harmless = "# a comment\nname: tiny\noptimizer: {lr: 1e-3, decay: off}\nbatch: {size: 512k tokens}\n"
    assert redact_yaml(harmless) == harmless
    secret = (
        f"a:\n  api_key: {CANARY}\n  b: {{hf_token: '{CANARY}', n: 1}}\n"
        f"secrets:\n  x: {CANARY}\n\n  y:\n    - {CANARY}\n"
        f"- password: >\n    {CANARY}\n    {CANARY}\nurl: s3://u:{CANARY}@h/x\nafter: 1\n"
    )
    shown = redact_yaml(secret)
    assert CANARY not in shown
    assert "n: 1" in shown
    assert "after: 1" in shown
