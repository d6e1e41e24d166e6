"""Plant faults in a copy of the package, one at a time, and see which test of the fast tier fails.

    python -m tests.bench.mutants [--out tests/bench/results/mutants.txt] [NAME ...]

A fault is one replacement of text in one file. `killed` names the first test that fails; `survived` is a fault that the
named tests do not see. The tests are run once on the unchanged copy too, so that a kill means something.
"""

from __future__ import annotations

import argparse
import compileall
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAST = "not slow and not exhaustive and not cluster and not gpu"
COPIED = ("bigtrain", "tests", "configs", "launch", "pyproject.toml")
LIMIT_S = 900


@dataclass(frozen=True)
class Mutant:
    """A fault, and the tests that should see it."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    """Arguments of pytest; an expression after `-k` where a file has more tests than are needed."""


_FSDP, _ACCELERATE = "bigtrain/engines/fsdp/engine.py", "bigtrain/engines/accelerate/engine.py"
_DEEPSPEED, _LOADER = "bigtrain/engines/deepspeed/engine.py", "bigtrain/data/loader.py"
_ON_SHARDS = ("tests/engines/test_fsdp.py", "-k", "every_layout_computes")
_BUILT = ("tests/optim/test_build.py",)

MUTANTS = {
    "accelerate ignores lr_scale": Mutant(
        _ACCELERATE, 'group["lr"] = lr * group["lr_scale"]', 'group["lr"] = lr', ("tests/engines/test_updates.py",)
    ),
    "fsdp ignores lr_scale": Mutant(
        "bigtrain/engines/fsdp/parts.py",
        'group["lr"] = rate * group["lr_scale"]',
        'group["lr"] = rate',
        ("tests/equivalence/test_fsdp.py", "-k", "one_process_computes and untied and tp2"),
    ),
    "deepspeed ignores lr_scale": Mutant(
        _DEEPSPEED,
        'group["lr"] = lr * group["lr_scale"]',
        'group["lr"] = lr',
        ("tests/engines/test_deepspeed.py", "-k", "one_process_under_zero"),
    ),
    "no weight decay on row-parallel matrices": Mutant(
        "bigtrain/optim/build.py",
        "decay = _weight_decay(config, rule, parameter)",
        'decay = 0.0 if name.endswith("output.weight") else _weight_decay(config, rule, parameter)',
        ("tests/training/test_reference.py",),
    ),
    "no weight decay on the tied embedding": Mutant(
        "bigtrain/optim/build.py",
        "decay = _weight_decay(config, rule, parameter)",
        'decay = 0.0 if name.startswith("embedding") else _weight_decay(config, rule, parameter)',
        ("tests/training/test_reference.py",),
    ),
    "the loss is divided by the padded count": Mutant(
        "bigtrain/models/decoder.py",
        "return LossSum(loss, weights.sum(), by_sequence(losses, weights))",
        "return LossSum(loss, torch.ones_like(weights).sum(), by_sequence(losses, weights))",
        _ON_SHARDS,
    ),
    "fsdp clips by the norm of one rank": Mutant(
        _FSDP,
        "norm = total.square.sqrt() * scale",
        "norm = square_of(counted, self.device).sqrt() * scale",
        ("tests/engines/test_fsdp.py", "-k", "clipping"),
    ),
    "accelerate clips by the norm of one rank": Mutant(
        _ACCELERATE,
        "norm = total.square.sqrt() * scale",
        "norm = square_of(counted, self.device).sqrt() * scale",
        ("tests/engines/test_accelerate.py", "-k", "two_ranks_compute and fsdp2"),
    ),
    "deepspeed does not clip": Mutant(
        _DEEPSPEED,
        "scale_and_clip(gradients, scale, self._mean_norm() * scale, self._clip)",
        "scale_and_clip(gradients, scale, self._mean_norm() * scale, None)",
        ("tests/engines/test_deepspeed.py", "-k", "clipping"),
    ),
    "replicas count twice in the norm": Mutant(
        _FSDP,
        "return all(at == 0 for at, placement in zip(",
        "return True or all(at == 0 for at, placement in zip(",
        _ON_SHARDS,
    ),
    "warm-up begins a step late": Mutant(
        "bigtrain/optim/schedule.py",
        "return self.peak_lr * (step + 1) / self.warmup_steps",
        "return self.peak_lr * step / self.warmup_steps",
        ("tests/optim/test_schedule.py",),
    ),
    "the loop takes the rate of the next step": Mutant(
        "bigtrain/training/loop.py",
        "lr = self.schedule.lr(done - 1)",
        "lr = self.schedule.lr(done)",
        ("tests/training/test_loop.py",),
    ),
    "fsdp drops the last micro-batch": Mutant(
        _FSDP,
        "for number, arrays in enumerate(micro_batches, 1):",
        "for number, arrays in enumerate(micro_batches[:-1] or micro_batches, 1):",
        _ON_SHARDS,
    ),
    "accelerate drops the last micro-batch": Mutant(
        _ACCELERATE,
        "for number, arrays in enumerate(micro_batches, start=1):",
        "for number, arrays in enumerate(micro_batches[:-1] or micro_batches, start=1):",
        ("tests/engines/test_accelerate.py", "-k", "two_ranks_compute and ddp"),
    ),
    "fillers count in an evaluation": Mutant(
        _LOADER,
        "blank = self._reader.blank(missing)",
        'blank = self._reader.blank(missing) | {"weights": self._reader.blank(missing)["weights"] + 1}',
        ("tests/data/test_loader.py", "-k", "evaluation"),
    ),
    "the mean over held-out sets is one of means": Mutant(
        "bigtrain/training/evaluation.py",
        "loss, weight = loss + held_out.totals.loss, weight + held_out.totals.weight",
        "loss, weight = loss + (held_out.totals.mean_loss or 0.0), weight + 1.0",
        ("tests/training/test_evaluation.py",),
    ),
    "bits per byte in nats": Mutant(
        "bigtrain/training/evaluators/loss.py",
        "totals.loss / held_out.text_bytes / math.log(2)",
        "totals.loss / held_out.text_bytes",
        ("tests/training/test_bits_per_byte.py",),
    ),
    "bits per byte over all tokens' bytes, evaluated or not": Mutant(
        "bigtrain/training/evaluation.py",
        "HeldOut(totals, totals.weight * (math.nan if per_token is None else per_token))",
        "HeldOut(totals, 1000.0 * (math.nan if per_token is None else per_token))",
        ("tests/training/test_evaluation.py",),
    ),
    "a resumed run begins its data anew": Mutant(
        "bigtrain/training/loop.py",
        "batches = self.loader.batches(done + skipped_batches)",
        "batches = self.loader.batches(skipped_batches)",
        ("tests/training/test_loop.py",),
    ),
    "a batch follows its step but for the place in the order": Mutant(
        _LOADER,
        "start, partners = step * batch_size, None",
        "start, partners = (step % 3) * batch_size, None",
        ("tests/data/test_loader.py",),
    ),
    "augmentation keyed by rank": Mutant(
        _LOADER,
        "augmenter.apply(arrays, draw, partners)",
        "augmenter.apply(arrays, draw._replace(epoch=draw.epoch + self._rank), partners)",
        ("tests/data/test_augment.py",),
    ),
    "every epoch has the order of the first": Mutant(
        "bigtrain/data/order/sample_order.py",
        "chosen = permutation(int(ends[-1]), self._key, _SEQUENCES, epoch, number)",
        "chosen = permutation(int(ends[-1]), self._key, _SEQUENCES, 0, number)",
        ("tests/data/test_order.py",),
    ),
    "dropout is the same at each step": Mutant(
        "bigtrain/data/order/sample_order.py",
        "return hash_words(seed, step, slots).view(np.int64)",
        "return hash_words(seed, 0, slots).view(np.int64)",
        ("tests/data/test_order.py",),
    ),
    "beta2 is ignored": Mutant(
        "bigtrain/optim/optimizers/adamw.py",
        "return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)",
        "return torch.optim.AdamW(groups, lr=self.lr, betas=(self.betas[0], 0.999), eps=self.eps, fused=True)",
        _BUILT,
    ),
    "eps is ignored": Mutant(
        "bigtrain/optim/optimizers/adamw.py",
        "return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)",
        "return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=True)",
        _BUILT,
    ),
    "a frozen parameter is in the optimizer": Mutant(
        "bigtrain/optim/build.py",
        "if is_frozen(config, name) or not parameter.requires_grad:\n            continue",
        "if not parameter.requires_grad:\n            continue",
        _BUILT,
    ),
    "a frozen parameter has a gradient, which counts in the norm": Mutant(
        _FSDP,
        "parameter.requires_grad_(False)",
        "parameter.requires_grad_(True)",
        ("tests/engines/test_frozen.py",),
    ),
    "a resume leaves the optimizer's moments at zero": Mutant(
        "bigtrain/training/restoring.py",
        "load_found(found, state, prefix=prefix, leave=leave)",
        'state = {k: v for k, v in state.items() if k.startswith("model.")}\n'
        '        load_found(found, state, prefix=prefix, leave=["optimizer.*"])',
        ("tests/training/test_resume.py", "-k", "killed_with_its_launcher"),
    ),
    "a skipped step decays the weights": Mutant(
        "bigtrain/engines/guard.py",
        "value.copy_(torch.where(bad.to(value.device), old, value))",
        "value.copy_(torch.where(bad.to(value.device) & (key is not None), old, value))",
        ("tests/engines/test_bad_steps.py",),
    ),
    "targets are the tokens themselves": Mutant(
        "bigtrain/data/kinds/tokens.py",
        '"targets": np.ascontiguousarray(block[:, 1:]),',
        '"targets": np.ascontiguousarray(block[:, :-1]),',
        ("tests/data/test_sequences.py",),
    ),
    "the logged loss is a mean of steps, not of tokens": Mutant(
        "bigtrain/training/loop.py",
        "        progress.interval_loss += numbers.loss\n        progress.interval_weight += numbers.weight\n",
        "        progress.interval_loss += numbers.loss / numbers.weight\n        progress.interval_weight += 1.0\n",
        ("tests/training/test_loop.py",),
    ),
}  # fmt: skip


def copied(root: Path, place: Path) -> Path:
    """A copy of what tests need."""
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, place / name)
    # Tests start many processes, which write no bytecode: it could outlive a fault.
    compileall.compile_dir(place, quiet=1, workers=0)
    return place


def changed(text: str, mutant: Mutant) -> str:
    """The file's text with the fault.

    Raises:
        ValueError: The text to replace does not stand there once.
    """
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file}: the text to replace stands there {text.count(mutant.old)} times")
    return text.replace(mutant.old, mutant.new)


def failing(tree: Path, tests: Sequence[str]) -> str | None:
    """The first test that fails in a tree, or None.

    Raises:
        RuntimeError: No test ran.
    """
    data = os.environ.get("BIGTRAIN_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    environment = {**os.environ, "PYTHONPATH": str(tree), "BIGTRAIN_TEST_DATA": data, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", FAST, *tests]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode == 0:
        return None
    found = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not found:
        raise RuntimeError(f"no test ran: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return str(found[0])


def judge(name: str, mutant: Mutant, tree: Path) -> str:
    """One line: what became of a fault."""
    path = tree / mutant.file
    before = path.read_text()
    path.write_text(changed(before, mutant))
    try:
        found = failing(tree, mutant.tests)
    finally:
        path.write_text(before)
    return f"survived  {name}" if found is None else f"killed    {name}: {found}"


def main() -> int:
    """Exit code 1 where a fault survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; all without any")
    parser.add_argument("--out", type=Path, help="file that the lines are written to")
    parser.add_argument("--unchanged", action="store_true", help="run all named tests on the unchanged copy first")
    arguments = parser.parse_args()
    chosen = {name: MUTANTS[name] for name in arguments.names or MUTANTS}
    lines = []
    with tempfile.TemporaryDirectory() as place:
        tree = copied(ROOT, Path(place))
        if arguments.unchanged:
            for tests in sorted({mutant.tests for mutant in chosen.values()}):
                found = failing(tree, tests)
                if found is not None:
                    print(f"{found} fails on the unchanged copy: no mutant can be judged")
                    return 2
        for name, mutant in chosen.items():
            lines.append(judge(name, mutant, tree))
            print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("".join(f"{line}\n" for line in lines))
    return int(any(line.startswith("survived") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
