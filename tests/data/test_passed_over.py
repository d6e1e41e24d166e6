"""Files that are not used are counted and named; a format is recognized by content, not by a name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bigtrain.config import UserError
from bigtrain.data.accounting import PassedOver
from bigtrain.data.formats.detect import detect
from bigtrain.data.formats.documents import documents
from bigtrain.data.formats.images import image_shape
from bigtrain.data.index import load_index
from bigtrain.data.indexing import index_directory
from bigtrain.data.kind import kind_named
from bigtrain.data.packing.documents import pack
from bigtrain.data.packing.options import PackOptions
from bigtrain.data.reading import open_reader
from bigtrain.data.tokenizers import Tokenizer

LINES = [{"text": f"line {number}", "meta": {"body": f"inner {number}"}} for number in range(5)]
JSON_LINES = "\n".join(map(json.dumps, LINES)).encode()


def png(colour: tuple[int, int, int] = (9, 9, 9)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "kind", "codec"),
    [
        ("part-0.json", JSON_LINES, "lines", None),
        ("part-0.txt", JSON_LINES, "lines", None),
        ("part-0.json.gz", gzip.compress(JSON_LINES, mtime=0), "lines", "gzip"),
        ("part-0.bz2", bz2.compress(JSON_LINES), "lines", "bzip2"),
        ("part-0", lzma.compress(JSON_LINES), "lines", "xz"),
        ("one.json", json.dumps(LINES[0]).encode(), "lines", None),
        ("all.json", json.dumps(LINES, indent=1).encode(), "records", None),
        ("package.json", json.dumps({"name": "x", "files": LINES}, indent=2).encode(), "text", None),
        ("numbers.json", b"[1, 2, 3]", "text", None),
        ("README", b"# read me", "text", None),
        ("a.txt", "é".encode("latin-1"), "binary", None),
        ("a.zip", b"PK\x03\x04 etc", "binary", None),
    ],
)
def test_a_format_is_recognized_by_content(
    tmp_path: Path, name: str, data: bytes, kind: str, codec: str | None
) -> None:
    (tmp_path / name).write_bytes(data)
    found = detect(tmp_path / name)
    assert (found.kind, found.codec) == (kind, codec)


@pytest.mark.parametrize("key", ["text", "meta.body"])
def test_documents_under_any_name_are_the_same(tmp_path: Path, key: str) -> None:
    (tmp_path / "a.json").write_bytes(JSON_LINES)
    (tmp_path / "b.json").write_text(json.dumps(LINES))
    (tmp_path / "c.xz").write_bytes(lzma.compress(JSON_LINES))
    expected = [line["text"] if key == "text" else line["meta"]["body"] for line in LINES]  # type: ignore[index]
    for name in ("a.json", "b.json", "c.xz"):
        assert ["".join(one.pieces()) for one in documents([tmp_path / name], key)] == expected
    with pytest.raises(UserError, match="no text under 'words'") as caught:
        list(documents([tmp_path / "b.json"], "words"))
    assert "text, meta.body" in str(caught.value.fix)


def test_what_a_directory_holds_besides_is_counted_by_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("words")
    (folder / "LICENSE").write_text("more words")
    (folder / "empty.txt").touch()
    (folder / "picture.png").write_bytes(png())
    (folder / "b.txt.bz2").write_bytes(bz2.compress(b"packed words"))
    (folder / "notes.log").write_text("a log")
    (folder / ".hidden.txt").write_text("no")
    (folder / "link").symlink_to(folder / "sub")
    summary = pack([folder], tmp_path / "out", Tokenizer())
    assert summary.splits["train"].documents == 3
    assert summary.passed.empty == 1
    assert summary.passed.files == {
        "a PNG image": ["picture.png"],
        "hidden": [".hidden.txt"],
        "a link to a directory, or a broken link": ["link"],
        "text of another suffix: name it to read it": ["notes.log"],
    }
    lines = "\n".join(summary.passed.lines())
    assert "picture.png" in lines
    assert "skipped 1 empty samples" in lines


def test_records_that_are_read_as_text_with_their_syntax_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "table.csv").write_text("id,text\n1,words\n")
    (folder / "strings.json.gz").write_bytes(gzip.compress(b'["some", "words"]'))
    (folder / "nested.json").write_text(json.dumps({"data": LINES}))
    (folder / "lines.json").write_bytes(JSON_LINES)
    (folder / "a.py").write_text("x = 1")
    summary = pack([folder], tmp_path / "out", Tokenizer())
    assert summary.passed.plain == ["nested.json", "strings.json.gz", "table.csv"]
    assert "read as plain text, including its syntax, one document for each file: 3 files" in "\n".join(
        summary.passed.lines()
    )
    assert pack([folder / "table.csv"], tmp_path / "one", Tokenizer()).passed.plain == ["table.csv"]


def test_a_file_that_two_inputs_name_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(f"words of {name}")
    inputs = [tmp_path / "in", tmp_path / "in" / "a.txt", f"{tmp_path}/in/*.txt"]
    summary = pack(inputs, tmp_path / "out", Tokenizer())
    assert summary.splits["train"].documents == 2
    assert {reason: len(files) for reason, files in summary.passed.files.items()} == {"named twice": 3}


def test_the_advice_for_utf_16_names_its_conversion(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("words".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16") as caught:
        pack([tmp_path / "a.txt"], tmp_path / "out", Tokenizer())
    assert "iconv -f utf-16" in (caught.value.fix or "")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("labels", np.array([0.0, 1.0]), "labels.astype"),
        ("labels", np.array([[0], [1]]), "labels.astype"),
        ("x", np.array(["2020-01-01"] * 2, dtype="M8[D]"), "Store one of <f2"),
    ],
)
def test_an_array_that_is_not_read_is_refused_by_what_it_is(
    tmp_path: Path, name: str, values: np.ndarray, said: str
) -> None:
    np.save(tmp_path / "y.npy", np.ones(2, np.float32))
    np.save(tmp_path / f"{name}.npy", values)
    with pytest.raises(UserError, match=r"not a list|not supported") as caught:
        kind_named("arrays").pack([tmp_path / "y.npy", tmp_path / f"{name}.npy"], tmp_path / "o", PackOptions())
    assert said in (caught.value.fix or "")


@pytest.mark.parametrize(("form", "said"), [("WEBP", "but WebP"), ("GIF", "but GIF"), ("", "not a PNG or JPEG image")])
def test_an_image_of_another_format_under_a_name_of_png_is_refused_by_what_it_is(
    tmp_path: Path, form: str, said: str
) -> None:
    path = tmp_path / "x.png"
    if form:
        Image.new("RGB", (4, 4)).save(path, format=form)
    else:
        path.write_bytes(b"not found")
    with pytest.raises(UserError) as caught:
        image_shape(path.read_bytes(), str(path))
    assert said in str(caught.value)
    assert "BytesIO" not in str(caught.value)


def test_what_no_array_or_image_is_made_of_is_named(tmp_path: Path) -> None:
    (tmp_path / "arrays").mkdir()
    for number in range(2):
        np.save(tmp_path / "arrays" / f"{number}.npy", np.ones(3, np.float32))
    np.savez(tmp_path / "arrays" / "2.npz", x=np.ones(3))
    options = PackOptions()
    kind_named("arrays").pack([tmp_path / "arrays"], tmp_path / "a", options)
    assert options.passed.files == {"neither .npy nor .cls, or hidden": ["2.npz"]}
    for name in ("cat/1", "cat/2", "cat/.3", "outside"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"{name}.png").write_bytes(png())
    (tmp_path / "images" / "cat" / "more").symlink_to(tmp_path)
    options = PackOptions()
    kind_named("images").pack([tmp_path / "images"], tmp_path / "i", options)
    assert options.passed.files == {
        "not in a class folder": [str(tmp_path / "images" / "outside.png")],
        "hidden": [str(tmp_path / "images" / "cat" / ".3.png")],
        "a link to a directory, or a broken link": [str(tmp_path / "images" / "cat" / "more")],
    }


def test_empty_and_bad_documents_are_counted_apart(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text(
        '{"text": ""}\n{"text": "x"}\n{"text": ""}\n\n{"text": ""}\n{"text": "yes"}\n'
    )
    (tmp_path / "in" / "b.txt").write_bytes(b"\xe9")
    (tmp_path / "in" / "c.jsonl.gz").write_bytes(gzip.compress(JSON_LINES * 50)[:-9])
    for validation in (0.0, "30%"):
        summary = pack([tmp_path / "in"], tmp_path / f"o{validation}", Tokenizer(), skip_bad=9, validation=validation)
        assert summary.passed.empty == 3
        named = [text.partition(":")[0].rpartition("/")[2] for text in summary.passed.bad]
        assert named == ["b.txt, byte 0", "c.jsonl.gz"]
    with pytest.raises(UserError, match="more than 1 samples are bad"):
        pack([tmp_path / "in"], tmp_path / "other", Tokenizer(), skip_bad=1)


def test_joined_tars_are_read_to_their_end(write_tar: Callable[..., Path], tmp_path: Path) -> None:
    first = write_tar(*((f"{number}.txt", b"a" * (number + 1)) for number in range(3)))
    data = (first / "a.tar").read_bytes()
    joined = tmp_path / "joined"
    joined.mkdir()
    (joined / "a.tar").write_bytes(data * 3)
    assert index_directory(joined, Tokenizer()).samples == 9
    (joined / "a.tar").write_bytes(data + data[:700])
    with pytest.raises(UserError, match="cut short"):
        index_directory(joined, Tokenizer())


def test_members_that_webdataset_skips_are_skipped_and_named(write_tar: Callable[..., Path]) -> None:
    directory = write_tar(
        ("LICENSE", b"free"), ("./._0.txt", b"\x00\x05\x16\x07"), ("./0.txt", b"one"), ("d/._1.txt", b"\0"),
        ("d/1.txt", b"two"),
    )  # fmt: skip
    passed = PassedOver()
    assert index_directory(directory, Tokenizer(), passed=passed).samples == 2
    assert {reason: len(names) for reason, names in passed.files.items()} == {
        "a member without a suffix": 1,
        "a hidden member": 2,
    }
    with tarfile.open(directory / "a.tar", "w") as tar:
        info = tarfile.TarInfo("__meta__/info.json")
        tar.addfile(info)
    with pytest.raises(UserError, match="no sample"):
        index_directory(directory, Tokenizer())


def test_a_class_number_goes_before_json(write_tar: Callable[..., Path]) -> None:
    members = [
        (f"{number}.{suffix}", data)
        for number in range(4)
        for suffix, data in (("json", b'{"label": 9}'), ("png", png()), ("cls", b"%d" % (number % 2)))
    ]
    index = index_directory(write_tar(*members))
    assert (index.kind, index.vocab_size) == ("images", 2)


def test_images_are_turned_as_their_exif_data_says(tmp_path: Path) -> None:
    pixels = np.zeros((6, 8, 3), np.uint8)
    pixels[:, :4] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 8  # turned a quarter to the left: the left half of the pixels is the lower one
    for name in ("x/0.jpg", "y/1.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "in" / name, exif=exif, quality=100, subsampling=0)
    (tmp_path / "in" / "x" / ".thumbs").mkdir()
    (tmp_path / "in" / "x" / ".thumbs" / "0.jpg").write_bytes(b"no")
    for size, shape in ((None, (8, 6, 3)), (4, (4, 4, 3))):
        out = tmp_path / f"out{size}"
        kind_named("images").pack([tmp_path / "in"], out, PackOptions(image_size=size))
        index = load_index(out / "train")
        assert index.image is not None
        assert (index.image.height, index.image.width, index.image.channels) == shape
        assert index.class_names == ("x", "y")
        image = open_reader(index, 1).read(np.asarray([0]), np.asarray([0]))["images"][0]
        assert image[0, 0, 0] < 60
        assert image[-1, 0, 0] > 200


@pytest.mark.parametrize(
    ("kind", "given"),
    [("tokens", "out"), ("tokens", "out/train/shard-000000.tar"), ("arrays", "out/train"), ("images", "out"),
     ("captions", "out/train")],
)  # fmt: skip
def test_shards_that_are_packed_again_are_refused_with_the_place_to_train_on(
    tmp_path: Path, kind: str, given: str
) -> None:
    (tmp_path / "a.txt").write_text("some words")
    pack([tmp_path / "a.txt"], tmp_path / "out", Tokenizer())
    with pytest.raises(UserError) as refused:
        kind_named(kind).pack([tmp_path / given], tmp_path / "again", PackOptions(tokenizer=Tokenizer()))
    assert f"data.train: {tmp_path / 'out' / 'train'})" in str(refused.value.fix)
    assert load_index(tmp_path / "out" / "train").tokens == 11


def test_a_sample_of_another_shape_is_skipped_by_the_name_of_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    folder.mkdir()
    for number in range(4):
        np.save(folder / f"{number}.npy", np.full(3, number, np.float32))
    np.save(folder / "5.npy", np.zeros(4, np.float32))
    (folder / "6.npy").write_bytes(b"nothing")
    (folder / "7.cls").write_bytes(b"1")
    kind = kind_named("arrays")
    with pytest.raises(
        UserError, match=r"holds array float32 \(4,\), but the first holds array float32 \(3,\)"
    ) as refused:
        kind.pack([folder], tmp_path / "out", PackOptions())
    assert refused.value.where == str(folder / "5.npy")
    summary = kind.pack([folder], tmp_path / "out", PackOptions(skip_bad=3))
    assert [one.split(":")[0] for one in summary.passed.bad] == [
        str(folder / name) for name in ("5.npy", "6.npy", "7.cls")
    ]
    assert summary.splits["train"].documents == 4


@pytest.mark.parametrize("kind", ["images", "captions"])
def test_an_image_of_another_size_is_skipped_by_the_name_of_its_file(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "in" / "class"
    folder.mkdir(parents=True)
    for number in range(4):
        (folder / f"{number}.png").write_bytes(png() if number else b"\x89PNG nothing")
        (folder / f"{number}.txt").write_text("a caption")
    Image.new("RGB", (6, 5)).save(folder / "2.png")
    given, options = tmp_path / "in", {"tokenizer": Tokenizer()}
    with pytest.raises(UserError):
        kind_named(kind).pack([given], tmp_path / "out", PackOptions(**options))
    summary = kind_named(kind).pack([given], tmp_path / "out", PackOptions(skip_bad=2, **options))
    assert {one.split(":")[0] for one in summary.passed.bad} == {str(folder / "0.png"), str(folder / "2.png")}
    assert any("6 x 5 pixels, but the first has 4 x 4" in one for one in summary.passed.bad)
    assert summary.splits["train"].documents == 2


@pytest.mark.parametrize("label", ["-1", "cat", "1.5", "\u0663"])
def test_a_label_that_is_no_class_is_named(tmp_path: Path, label: str) -> None:
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.zeros(2, np.float32))
        (tmp_path / f"{number}.cls").write_text(label if number else "0")
    with pytest.raises(UserError, match=f"the label '{label}' is not a class number") as refused:
        kind_named("arrays").pack([tmp_path], tmp_path / "out", PackOptions())
    assert refused.value.where == str(tmp_path / "1.cls")
