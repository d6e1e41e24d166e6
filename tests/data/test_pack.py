from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset

from bigtrain.config import UserError
from bigtrain.data.index import ShardIndex, load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.packing.documents import pack, parse_share
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


def test_a_shard_has_the_bytes_that_webdatasets_writer_would_write(packed: ShardIndex, texts: list[str]) -> None:
    buffer = io.BytesIO()
    options = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False, "compress": False}
    with webdataset.TarWriter(buffer, **options) as tar:
        for number, text in enumerate(texts[: packed.shards[0].nsamples]):
            member = io.BytesIO()
            np.save(member, np.asarray([*text.encode(), 256], dtype="<u2"))
            tar.write({"__key__": f"{number:09d}", "npy": member.getvalue()})
    assert (packed.directory / packed.shards[0].url).read_bytes() == buffer.getvalue()


def test_the_index_is_the_one_that_reading_the_shards_over_gives(packed: ShardIndex, tmp_path: Path) -> None:
    read_over = tmp_path / "again"
    read_over.mkdir()
    for shard in packed.shards:
        shutil.copy(packed.directory / shard.url, read_over)
    index_directory(read_over, Tokenizer(), packed.text_bytes)
    assert contents(read_over) == contents(packed.directory)


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


KILLED = """
import sys
from pathlib import Path
from bigtrain.data.packing.documents import pack
from bigtrain.data.tokenizers import Tokenizer
def slow(stage, done, total):
    print(stage, done, flush=True)
    sys.stdin.readline()
pack([sys.argv[1]], sys.argv[2], Tokenizer(), shard_bytes=2048, part_bytes=600, validation="10%", progress=slow)
"""


def test_a_killed_packing_goes_on_and_repeats_nothing_that_is_finished(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(corpus), str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdin is not None
    while (line := process.stdout.readline().strip()) != "tokenised 6":
        assert line, "it ended before"
        process.stdin.write("\n")
        process.stdin.flush()
    process.kill()
    process.communicate()
    assert not out.exists()
    work = tmp_path / ".out.packing"
    finished = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.suffix in (".tar", ".json")}
    shards = {path: stamp for path, stamp in finished.items() if path.suffix == ".tar"}
    assert len(shards) > 1
    last = max(shards)
    options = {"shard_bytes": 2048, "part_bytes": 600, "validation": "10%"}
    seen: list[str] = []
    kept = {path.relative_to(work): stamp for path, stamp in shards.items() if path != last}
    pack([corpus], out, Tokenizer(), progress=lambda stage, done, total: seen.append(stage), **options)
    assert kept == {path: (out / path).stat().st_mtime_ns for path in kept}
    assert not work.exists()
    pack([corpus], tmp_path / "clean", Tokenizer(), **options)
    assert contents(out) == contents(tmp_path / "clean")


def test_what_a_kill_left_of_other_input_is_not_gone_on_with(tmp_path: Path, corpus: Path) -> None:
    work = tmp_path / ".out.packing"
    (work / "parts").mkdir(parents=True)
    (work / "job.json").write_text('{"identity": "other"}')
    (work / "parts" / "00000000.json").write_text("{}")
    pack([corpus], tmp_path / "out", Tokenizer(), shard_bytes=2048)
    load_index(tmp_path / "out" / "train").check("always")
    assert not work.exists()


def test_a_second_packing_to_the_same_place_is_refused(tmp_path: Path, corpus: Path) -> None:
    def another(stage: str, done: int, total: int) -> None:
        with pytest.raises(UserError, match="another process"):
            pack([corpus], tmp_path / "out", Tokenizer())

    pack([corpus], tmp_path / "out", Tokenizer(), shard_bytes=2048, progress=another)
    assert load_index(tmp_path / "out" / "train").samples == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "out"]


def test_any_number_of_workers_and_any_size_of_parts_gives_the_same_bytes(
    tmp_path: Path, corpus: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigtrain.data.packing.documents.SMALL_INPUT_BYTES", 0)
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, workers, part_bytes in (("one", 1, 1 << 20), ("many", 1, 100), ("two", 2, 700)):
        pack(
            [corpus, lines], tmp_path / name, Tokenizer(),
            validation="10%", shard_bytes=2048, workers=workers, part_bytes=part_bytes,
        )  # fmt: skip
    assert contents(tmp_path / "one") == contents(tmp_path / "many") == contents(tmp_path / "two")
    train, held_out = stored(tmp_path / "one" / "train"), stored(tmp_path / "one" / "validation")
    assert sorted(train + held_out) == sorted(expected(texts) * 2)


def test_bad_documents_are_passed_over_up_to_a_number_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"other": 1}\n{"text": "two"}\nnonsense\n')
    (tmp_path / "b.txt").write_bytes(b"half a \xff")
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt"]
    for validation in (0.0, 0.5):
        with pytest.raises(UserError, match="more than 2"):
            pack(inputs, tmp_path / "no", Tokenizer(), skip_bad=2, validation=validation)
        summary = pack(inputs, tmp_path / f"out{validation}", Tokenizer(), skip_bad=3, validation=validation)
        assert [text.split(":")[0].rsplit("/")[-1] for text in summary.passed.bad] == [
            "a.jsonl, line 2", "a.jsonl, line 4", "b.txt, byte 7",
        ]  # fmt: skip
        assert sum(split.documents for split in summary.splits.values()) == 2


@pytest.mark.parametrize("value", ["1", "100%", "-1%", "abc", 1.5, "nan"])
def test_what_is_no_share_is_refused(value: float | str) -> None:
    with pytest.raises(UserError, match="share"):
        parse_share(value)
    assert parse_share("1%") == 0.01
