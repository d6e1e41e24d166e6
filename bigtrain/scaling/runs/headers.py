"""The names of columns: which quantity a column of a published table holds, and in which unit.

A name consists of words, and perhaps of a unit: "Params (M)", "tokens_b", "FLOPs (10^18)", "Compute [PF-days]". A
quantity is found by a list of known names first, in order of preference, and then by single words of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from bigtrain.scaling.law import FloatArray

KNOWN: dict[str, tuple[str, ...]] = {
    "params": ("active_params", "params_active", "activated_params", "active_parameters", "activated_parameters",
               "num_active_params", "params_active_precise", "n_active", "n_act", "params", "n", "n_params",
               "num_params", "parameters", "parameter_count", "model_size", "size", "total_params", "params_total",
               "total_parameters", "n_total"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "training_tokens", "train_tokens", "total_tokens", "n_tok"),
    "flops": ("flops", "c", "flop", "training_flop", "training_flops", "train_flops", "total_flops", "compute",
              "compute_budget", "training_compute", "train_compute"),
    "loss": ("val_loss", "validation_loss", "eval_loss", "final_loss", "loss", "loss_validation", "loss_val",
             "loss_eval", "test_loss", "train_loss"),
    "group": ("group", "model", "model_name", "run_name"),
    "run": ("run", "run_id", "id", "trial", "name", "run_name"),
    "seed": ("seed", "random_seed", "rng_seed", "init_seed", "data_seed"),
    "phase": ("phase", "schedule_phase"),
    "lr": ("lr", "learning_rate", "peak_lr", "max_lr", "optimizer_lr", "eta"),
    "batch": ("batch_tokens", "batch_size", "batch", "bs", "global_batch_size", "global_batch", "tokens_per_batch"),
    "unique_tokens": ("unique_tokens", "tokens_unique", "unique_d", "dataset_tokens"),
    "ratio": ("tokens_per_param", "tokens_per_parameter", "tokens_per_params", "d_n", "d_over_n", "tpp",
              "tokens_param", "tokens_params", "tokens_parameter", "tok_param"),
    "params_without_embeddings": ("params_without_embeddings", "n_without_embeddings", "non_embedding_params",
                                  "params_non_embedding", "n_params_non_embedding", "non_embedding_parameters",
                                  "num_params_non_embedding", "n_non_embedding", "n_nonemb", "n_non_emb"),
}  # fmt: skip
"""Names by which each column is recognised, in order of preference."""

_SIZE_WORDS = {"params", "parameters", "param", "parameter"}
_WORDS: dict[str, tuple[set[str], set[str]]] = {
    "params": (_SIZE_WORDS, {
        "per", "ratio", "token", "tokens", "tok", "flops", "expert", "trainable", "frozen", "embedding", "embeddings",
        "emb", "nonembedding", "share", "fraction", "percent", "lr",
    }),
    "tokens": ({"tokens", "token", "tok", "toks"}, {
        *_SIZE_WORDS, "per", "s", "sec", "second", "batch", "unique", "vocab", "ratio", "throughput", "step", "length",
        "context", "seq", "sequence", "loss", "accuracy", "val", "validation", "eval", "test", "warmup", "flops",
        "bits", "nats",
    }),
    "lr": ({"lr", "learning"}, {
        "min", "minimum", "final", "end", "decay", "schedule", "scheduler", "warmup", "multiplier", "ratio", "scale",
        "type", "steps", "embedding",
    }),
    "batch": ({"batch", "bsz", "bs", "gbs", "batchsize"}, {
        "micro", "per", "device", "local", "gpu", "num", "warmup", "beta", "beta2", "lr", "learning",
    }),
    "seed": ({"seed"}, set()),
    "flops": ({"flops", "flop", "compute"}, {
        "per", "s", "sec", "second", "gpu", "hours", "utilization", "mfu", "log", "ln", "cost", "fraction", "share",
        "multiplier", "optimal", "efficiency", "token", "step", "loss",
    }),
    "params_without_embeddings": ({"non", "nonembedding", "nonemb", "without"}, {"lr", "tokens", "loss", "flops"}),
}  # fmt: skip
"""For each quantity, words of which a name must have one, and words of which it must have none."""
_KINDS = {"total", "active", "activated", "non", "embedding", "embeddings", "nonembedding", "emb", "unique"}
"""Words in brackets that change the meaning of a name."""
_LOSS_LIKE = tuple(re.compile(pattern) for pattern in (
    r"(^|_)(val|valid|validation|eval|evaluation|held_out|test)(_.*)?_(loss|nll|ce|cross_entropy)(_|$)",
    r"(^|_)(loss|nll|ce|cross_entropy)(_.*)?_(val|valid|validation|eval|evaluation|held_out|test)(_|$)",
    r"(^|_)(loss|nll|ce|cross_entropy)$",
))  # fmt: skip
"""Patterns of further names of columns of losses, such as `eval/c4/loss` and `smooth loss`, held-out losses first."""
_NO_LOSS = re.compile(
    r"(^|_)(aux|z|balanc\w*|router|std|scale|scaler|var|grad|bound|delta|ppl|perplexity|bpb|byte)(_|$)"
)
_PERPLEXITY = re.compile(r"(^|_)(ppl|perplexity)(_|$)")
_PER_BYTE = re.compile(r"(^|_)(bpb|bits_per_byte|bits_byte)(_|$)")
_UNITS = {
    "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "thousand": 1e3, "million": 1e6, "billion": 1e9,
    "trillion": 1e12, "thousands": 1e3, "millions": 1e6, "billions": 1e9, "trillions": 1e12,
}  # fmt: skip
_FLOP_UNITS = {
    "gflops": 1e9,
    "gflop": 1e9,
    "tflops": 1e12,
    "tflop": 1e12,
    **dict.fromkeys(("pflops", "pflop", "petaflops", "petaflop"), 1e15),
    **dict.fromkeys(("eflops", "eflop", "exaflops", "exaflop"), 1e18),
    **dict.fromkeys(("zflops", "zflop", "zettaflops", "zettaflop"), 1e21),
    **dict.fromkeys(("pf_days", "pfs_days", "petaflop_days", "petaflops_days", "petaflop_s_days"), 8.64e19),
}
"""Units of FLOPs; a PF-day is 1e15 FLOP/s for a day."""
_LEAST_FLOP_UNIT = 1e15
"""A column in a smaller unit is not guessed to hold a run's FLOPs: it often has those of a second or of one token."""
_BRACKETS = re.compile(r"[(\[]([^)\]]*)[)\]]")
_POWER = re.compile(r"(?:^|(?<=[\s_x*/(\[]))(?:10\s*(?:\^|\*\*)\s*|1?e\+?)\{?(-?[0-9]{1,2})\}?(?![0-9a-z])")
_TRAILING_POWER = re.compile(r"[_/ ](?:1?e|10\s*\^\s*)\+?-?[0-9]+$")
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻×", "0123456789-x")
_IN_LOG10 = "log10_"


@dataclass(frozen=True)
class Header:
    """The name of a column, taken apart."""

    plain: str
    """All words in lower case, joined by underscores."""
    forms: tuple[str, ...]
    """Names to look up: the whole one, and those without the unit and without remarks in brackets."""
    power: float | None
    """A power of ten in the name ("FLOPs (1e18)"); None if there is none."""
    letter: float | None
    """A factor given by a letter or word ("Params (M)", "tokens_in_billions"); None if there is none."""
    flop_unit: float | None
    """A unit of FLOPs in the name ("compute_zflops"); None if there is none."""
    log10: bool
    """Whether the column holds decimal logarithms."""

    @property
    def words(self) -> set[str]:
        """The words of the complete name."""
        return set(self.plain.split("_"))


def plain_name(name: str) -> str:
    """A column's name in lower case with one underscore in place of all other characters than letters and digits."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


@cache
def parse_header(name: str) -> Header:
    """Take the name of a column apart."""
    text = re.sub(r"(?<=10)([⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+)", r"^\1", name.lower()).translate(_SUPERSCRIPTS)
    power = _POWER.search(text) if _BRACKETS.search(text) or _TRAILING_POWER.search(text) else None
    text = text[: power.start()] + " " + text[power.end() :] if power else text
    remarks = [plain_name(part) for part in _BRACKETS.findall(text)]
    bare = plain_name(_BRACKETS.sub(" ", text))
    plain = plain_name(text)
    log10 = plain.startswith(_IN_LOG10)
    if log10:
        plain = plain.removeprefix(_IN_LOG10)
        return Header(plain, (plain,), None, None, None, log10)
    letter: float | None = None
    for remark in remarks:
        first = remark.removeprefix("in_").split("_")[0]
        letter = letter or _UNITS.get(first)
    forms = [plain]
    match = re.fullmatch(r"(?P<base>.{2,}?)_(?:in_)?(?P<unit>[a-z]+)", bare)
    if match and letter is None and match["unit"] in _UNITS:
        letter, bare = _UNITS[match["unit"]], match["base"]
    flop_unit = None
    for unit, factor in _FLOP_UNITS.items():
        if plain == unit or plain.endswith(f"_{unit}"):
            flop_unit = factor
            if factor >= _LEAST_FLOP_UNIT:
                bare = bare.removesuffix(unit).strip("_") or "flops"
    if not {word for remark in remarks for word in remark.split("_")} & _KINDS:
        forms.append(bare)
    forms += [f"{bare}_{remark}" for remark in remarks if bare and remark and remark not in _UNITS]
    return Header(
        plain, tuple(forms), 10.0 ** int(power[1]) if power else None, letter, flop_unit, log10
    )  # fmt: skip


def columns_for(wanted: str, names: Iterable[str], strict: bool = False) -> list[str]:
    """The columns that may hold a quantity, the most likely one first.

    Args:
        wanted: A key of `KNOWN`.
        names: The names of all columns.
        strict: Whether a name must be a known one, apart from its unit.
    """
    ranked = []
    for place, name in enumerate(names):
        rank = _rank(wanted, parse_header(name))
        if rank is not None and (rank <= len(KNOWN[wanted]) or not strict):
            ranked.append((rank, place, name))
    return [name for *_, name in sorted(ranked)]


def _rank(wanted: str, header: Header) -> float | None:
    known = KNOWN[wanted]
    if header.log10 and wanted not in ("params", "tokens", "flops"):
        return None
    if wanted == "loss":
        if header.plain in known:
            return known.index(header.plain)
        likely = [] if _NO_LOSS.search(header.plain) else [
            len(known) + number for number, pattern in enumerate(_LOSS_LIKE) for form in header.forms
            if pattern.search(form)
        ]  # fmt: skip
        return min(likely, default=None)
    ranks = [known.index(form) for form in header.forms if form in known]
    if ranks:
        return min(ranks)
    if wanted == "flops" and header.flop_unit is not None:
        return len(known) if header.flop_unit >= _LEAST_FLOP_UNIT else None
    if wanted not in _WORDS:
        return None
    some, none = _WORDS[wanted]
    if not header.words & some or header.words & none:
        return None
    return len(known) + 2 + ("total" in header.words) - bool(header.words & {"active", "activated"})


def unit_of(wanted: str, name: str) -> float:
    """The unit of a column in parameters, tokens or FLOPs, by its name: 1e9 for "params_B" and "N (B)", otherwise 1."""
    header = parse_header(name)
    if wanted == "flops" and header.flop_unit is not None:
        return header.flop_unit
    if wanted in ("params", "tokens", "flops", "unique_tokens", "params_without_embeddings", "batch"):
        return (header.power or 1.0) * (header.letter or 1.0 if wanted != "flops" else 1.0)
    return header.power or 1.0 if wanted == "lr" else 1.0


def other_losses(names: Iterable[str]) -> list[str]:
    """Columns of perplexities or bits per byte, which serve as losses if there is no other."""
    return [name for name in names for form in (_PERPLEXITY, _PER_BYTE) if form.search(plain_name(name))]


def loss_of(name: str, values: FloatArray) -> tuple[FloatArray, str | None]:
    """The loss of a column whose name says that it is not in nats per token, and a note on it; shape (n,)."""
    plain = plain_name(name)
    if _PERPLEXITY.search(plain):
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(values), f"the loss is the logarithm of column '{name}'"
    if _PER_BYTE.search(plain):
        return values, f"all losses are in bits per byte, as in column '{name}'; N*, D* and exponents do not change"
    if "bits" in plain.split("_"):
        return values * np.log(2.0), f"the loss is ln 2 times column '{name}', which is in bits"
    return values, None
