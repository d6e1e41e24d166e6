"""What a run trains on (`data`), and how it is read (`streaming`)."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from annotated_types import Ge
from pydantic import BeforeValidator, Field, field_validator

from bigtrain.config import NUMBER_OR_TEXT, Bytes, Duration, Section

SCHEMES = ("http", "https", "s3", "gs")
"""Where shards may be streamed from; everything else is refused, above all `pipe:`, which is a shell."""


def is_url(place: str) -> bool:
    """Whether a place is named by a scheme and not by a path."""
    return "://" in place or place.startswith("pipe:")


def check_url(url: str) -> str:
    """A URL of an allowed scheme, without the slash at its end.

    Raises:
        ValueError: Another scheme, no host or bucket, credentials, a query or a fragment.
    """
    scheme, _, rest = url.partition(":")
    if scheme not in SCHEMES or not rest.startswith("//"):
        raise ValueError(f"the scheme {scheme[:20]!r} is not one of {', '.join(SCHEMES)}; a local directory is a path")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"the {scheme} URL carries credentials, a query or a fragment: those of s3 and gs come from the environment"
        )
    if not parts.netloc or any(ord(letter) <= 32 for letter in url):
        raise ValueError(f"the {scheme} URL names no host or bucket, or holds a space")
    return url.rstrip("/")


def _seconds(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    duration = Duration.parse(value)
    if not duration.is_time:
        raise ValueError(f"{value!r} is not a time: write seconds (20), or for example '20 s'")
    return duration.seconds


class DataConfig(Section):
    """What is trained on: part of a run's identity, by the data's fingerprint and not by its place."""

    train: str
    """A directory of shards, as `bigtrain data pack` or `data index` leaves it, or its http, https, s3 or gs URL."""

    validation: str | None = None
    """A directory or URL of held-out shards; null where the run is not evaluated."""

    document_mask: bool = False
    """Whether a token sees only its own document inside a packed sequence."""

    shuffle_window: Annotated[int, Ge(1)] = 8
    """Shards whose sequences are mixed with each other; a shard is read inside one window an epoch."""

    @field_validator("train", "validation", mode="before")
    @classmethod
    def _one_place(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple, dict)):
            raise ValueError("several sources are not mixed: give the path or URL of one shard directory")
        if isinstance(value, str) and not value.strip():
            raise ValueError("the path of the shard directory is empty")
        return check_url(value) if isinstance(value, str) and is_url(value) else value


class StreamingConfig(Section):
    """How the data is read: changes nothing of what is trained."""

    verify: Literal["auto", "always", "never"] = "auto"
    """Hashing every local shard at the start: auto does so up to 4 GB; beyond it, and never, sizes only. What is
    fetched is always hashed on arrival, and, but for never, again when it comes from the cache."""

    log_samples: bool = False
    """Whether the samples of each step are recorded in samples.jsonl."""

    prefetch: Annotated[int, Ge(1)] = 2
    """Steps that a background thread prepares ahead."""

    cache: Annotated[Bytes, Field(ge=1)] = 20 * 10**9
    """Size that fetched shards take on this machine's disk at most ("20 GB"), all ranks and runs together."""

    cache_dir: str | None = None
    """Where they lie, on a local disk; null: BIGTRAIN_CACHE, else ~/.cache/bigtrain."""

    timeout: Annotated[float, BeforeValidator(_seconds), NUMBER_OR_TEXT, Field(gt=0)] = 20.0
    """Silence of a server, in seconds or as "20 s", after which a request is given up and tried again."""

    retries: Annotated[int, Ge(0)] = 8
    """Failures in a row, without a byte between them, after which a fetch fails; the waits between grow to 30 s."""
