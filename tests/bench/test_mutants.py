"""The planted faults still fit the code: each replaces a text that stands once in its file."""

from __future__ import annotations

import pytest

from tests.bench.mutants import MUTANTS, ROOT, changed


@pytest.mark.exhaustive
def test_every_fault_can_be_planted_and_names_tests_that_are_there() -> None:
    """By hand, as the faults are: a change of one of these lines is no failure of the change."""
    for name, mutant in MUTANTS.items():
        source = changed((ROOT / mutant.file).read_text(), mutant)
        compile(source, mutant.file, "exec")
        assert (ROOT / mutant.tests[0]).is_file(), name
