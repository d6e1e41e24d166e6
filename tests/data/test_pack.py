from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from bigtrain.config import UserError
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.pack import pack, parse_share
from bigtrain.data.tokenizers import Tokenizer


def stored(directory: Path) -> list[list[int]]:
    """The documents of a shard directory as plain WebDataset reads them, without our index."""
    urls = sorted(str(path) for path in directory.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    return [np.load(io.BytesIO(sample["npy"]), allow_pickle=False).tolist() for sample in samples]


def expected(texts: list[str]) -> list[list[int]]:
    return [[*text.encode(), 256] for text in texts]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_plain_webdataset_reads_the_documents(packed: ShardIndex, texts: list[str]) -> None:
    assert stored(packed.directory) == expected(texts)
    urls = [str(packed.directory / shard.url) for shard in packed.shards]
    decoded = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert decoded[0]["npy"].dtype == np.uint16
    assert decoded[0]["__key__"] == "000000000"


def test_packing_twice_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    for name in ("one", "two"):
        pack([corpus], tmp_path / name, Tokenizer(), validation="10%", shard_bytes=2048)
        for path in corpus.iterdir():
            os.utime(path, (1, 1))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_held_out_documents_are_a_fixed_share_and_no_document_is_lost(
    tmp_path: Path, corpus: Path, texts: list[str]
) -> None:
    summary = pack([corpus], tmp_path / "out", Tokenizer(), validation=0.1)
    train, held_out = stored(tmp_path / "out" / "train"), stored(tmp_path / "out" / "validation")
    assert len(held_out) == summary.splits["validation"].documents == 4
    assert sorted(train + held_out) == sorted(expected(texts))
    assert summary.held_out == "documents"
    other = pack([corpus], tmp_path / "other", Tokenizer(), validation=0.1, seed=1)
    assert other.splits["validation"].fingerprint != summary.splits["validation"].fingerprint


def test_copies_of_a_text_fall_on_the_same_side(tmp_path: Path) -> None:
    lines = [f'{{"text": "text {number % 10}"}}\n' for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    pack([tmp_path / "a.jsonl"], tmp_path / "out", Tokenizer(), validation="1%")
    train, held_out = (
        {tuple(document) for document in stored(tmp_path / "out" / name)} for name in ("train", "validation")
    )
    assert held_out
    assert train
    assert not train & held_out


def test_a_single_document_gives_up_its_tail(tmp_path: Path, real_data: Path) -> None:
    source = real_data / "tinyshakespeare" / "input.txt"
    tokenizer = Tokenizer.open(str(real_data / "tokenizer_gpt2"))
    summary = pack([source], tmp_path / "out", tokenizer, validation="10%")
    assert summary.held_out == "tail"
    # nanoGPT's numbers, and one end of text each.
    assert (summary.splits["train"].tokens, summary.splits["validation"].tokens) == (301_967, 36_060)
    assert summary.splits["train"].characters + summary.splits["validation"].characters == 1_115_394
    json = summary.as_json()
    assert json["splits"]["train"]["characters_per_token"] == pytest.approx(3.32, abs=0.01)


def test_a_document_larger_than_a_shard_continues_in_the_next(tmp_path: Path) -> None:
    text = "x" * 5000
    (tmp_path / "a.txt").write_text(text)
    pack([tmp_path / "a.txt"], tmp_path / "out", Tokenizer(), shard_bytes=2048)
    parts = stored(tmp_path / "out" / "train")
    assert len(parts) > 3
    assert [token for part in parts for token in part] == [*text.encode(), 256]


def test_an_output_that_is_not_empty_is_left_alone(tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        pack([corpus], tmp_path / "out", Tokenizer())
    assert contents(tmp_path / "out") == {"precious": b"x"}


def test_a_failure_leaves_nothing_behind(tmp_path: Path, corpus: Path) -> None:
    (corpus / "zzz.txt").write_bytes(b"bad \xff")
    with pytest.raises(UserError, match="UTF-8"):
        pack([corpus], tmp_path / "out", Tokenizer(), shard_bytes=2048)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus"]


def test_text_of_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    for validation in (0.0, "1%"):
        with pytest.raises(UserError, match="empty"):
            pack([tmp_path / "a.txt"], tmp_path / "out", Tokenizer(), validation=validation)


def test_a_kill_leaves_no_output_and_the_next_start_removes_its_remains(tmp_path: Path, corpus: Path) -> None:
    code = (
        "import time\nfrom bigtrain.data.pack import pack\nfrom bigtrain.data.tokenizers import Tokenizer\n"
        "def slow(name, documents, tokens):\n    print(documents, flush=True)\n    time.sleep(0.05)\n"
        f"pack([{str(corpus)!r}], {str(tmp_path / 'out')!r}, Tokenizer(), shard_bytes=2048, progress=slow)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "15":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (remains,) = tmp_path.glob(".out.tmp-*")
    assert not (tmp_path / "out").exists()
    pack([corpus], tmp_path / "out", Tokenizer(), shard_bytes=2048)
    assert not remains.exists()
    load_index(tmp_path / "out" / "train").check("always")


def test_of_two_that_pack_into_one_place_the_first_to_end_wins_and_neither_is_torn(
    tmp_path: Path, corpus: Path
) -> None:
    def another(name: str, documents: int, tokens: int) -> None:
        if documents == 20:
            pack([corpus], tmp_path / "out", Tokenizer(), shard_bytes=2048)

    with pytest.raises(UserError, match="put in place"):
        pack([corpus], tmp_path / "out", Tokenizer(), shard_bytes=4096, progress=another)
    index = load_index(tmp_path / "out" / "train")
    index.check("always")
    assert index.samples == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


@pytest.mark.parametrize("value", ["1", "100%", "-1%", "abc", 1.5, "nan"])
def test_what_is_no_share_is_refused(value: float | str) -> None:
    with pytest.raises(UserError, match="share"):
        parse_share(value)
    assert parse_share("1%") == 0.01
