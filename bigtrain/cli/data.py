"""Commands on data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from bigtrain.cli.common import Json, PluginOption, counting, errors, lines, load_plugins, show, stages

INPUTS = "Text, .jsonl, .parquet, tars of text, each also .gz or .zst; directories; patterns."

app = typer.Typer(help="Pack text into shards, index tars, look into both.", no_args_is_help=True)


@app.command("pack")
def data_pack(
    inputs: Annotated[list[str], typer.Argument(help=INPUTS)],
    out: Annotated[Path, typer.Option(help="A new directory; gets train/ and validation/.")],
    tokenizer: Annotated[
        str | None, typer.Option(help="bytes, a tokenizer.json, or a directory with GPT-2's files.")
    ] = None,
    images: Annotated[bool, typer.Option("--images", help="Pack images from FOLDER/CLASS/NAME.png or .jpg.")] = False,
    captions: Annotated[
        bool, typer.Option("--captions", help="Pack images with captions: folders, tars, .jsonl; see the README.")
    ] = False,
    arrays: Annotated[
        bool, typer.Option("--arrays", help="Pack arrays: NAME.npy files of all samples, or a folder of KEY.npy.")
    ] = False,
    image_size: Annotated[int | None, typer.Option(min=1, help="Make images squares of so many pixels.")] = None,
    validation: Annotated[str, typer.Option(help="Share of the documents to hold out, such as 1%.")] = "0%",
    key: Annotated[str, typer.Option(help="The key of a JSON line, or column, that holds the text.")] = "text",
    shard_size: Annotated[str, typer.Option(help="Size of a shard.")] = "64 MiB",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores where not given.")] = None,
    skip_bad: Annotated[int, typer.Option(min=0, help="Documents that may be bad, and are passed over.")] = 0,
    as_json: Json = False,
) -> None:
    """Pack text, images or arrays into WebDataset shards; after a kill the same command goes on."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.config.units import parse_bytes
        from bigtrain.data.packing.arrays import pack_arrays
        from bigtrain.data.packing.documents import pack
        from bigtrain.data.packing.images import pack_captions, pack_images
        from bigtrain.data.tokenizers import Tokenizer

        try:
            shard_bytes = parse_bytes(shard_size)
        except ValueError as error:
            raise UserError(str(error), "--shard-size") from None
        common: dict[str, Any] = {
            "validation": validation,
            "shard_bytes": shard_bytes,
            "skip_bad": skip_bad,
            "workers": workers or len(os.sched_getaffinity(0)),
        }
        if images + captions + arrays > 1:
            raise UserError("--images, --captions and --arrays are three kinds of data", fix="give one of them")
        if (images or arrays) and tokenizer is not None:
            raise UserError("images and arrays are packed without a tokenizer", fix="leave out --tokenizer")
        if images and len(inputs) != 1:
            raise UserError("images are packed from one folder")
        with stages() as progress:
            if images:
                summary = pack_images(inputs[0], out, size=image_size, progress=progress, **common)
            elif arrays:
                summary = pack_arrays(inputs, out, progress=progress, **common)
            elif tokenizer is None:
                raise UserError("text needs a tokenizer", fix="name one with --tokenizer, for example bytes")
            elif captions:
                opened = Tokenizer.open(tokenizer)
                summary = pack_captions(inputs, out, opened, key=key, size=image_size, progress=progress, **common)
            else:
                summary = pack(inputs, out, Tokenizer.open(tokenizer), key=key, progress=progress, **common)
        show(summary.as_json(), as_json, lines)


@app.command("tokenizer")
def data_tokenizer(
    inputs: Annotated[list[str], typer.Argument(help=INPUTS)],
    vocab: Annotated[int, typer.Option(help="Entries of the vocabulary.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    as_json: Json = False,
) -> None:
    """Learn a byte-level BPE tokenizer from text."""
    with errors(as_json):
        from bigtrain.data.formats.documents import documents
        from bigtrain.data.tokenizers import train_bpe

        learned = train_bpe(documents(inputs), vocab, out)
        result = {"out": str(out), "vocab_size": learned.vocab_size}
        show(result, as_json, lambda value: f"{value['out']}: {value['vocab_size']} tokens")


@app.command("index")
def data_index(
    places: Annotated[list[str], typer.Argument(help="A directory of tars made elsewhere, or URLs of tars.")],
    out: Annotated[Path | None, typer.Option(help="For URLs: a new directory for the index.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="For text, or what made the tokens.")] = None,
    skip_bad: Annotated[int, typer.Option(min=0, help="Samples that may be bad, and are passed over.")] = 0,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Index tars made elsewhere, so that runs can read them."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.config.urls import is_url
        from bigtrain.data.formats.text import BadSamples
        from bigtrain.data.indexing import index_directory, index_urls
        from bigtrain.data.tokenizers import Tokenizer

        load_plugins(plugin)
        bad = BadSamples(skip_bad)
        opened = None if tokenizer is None else Tokenizer.open(tokenizer)
        with counting("indexing") as count:
            if any(is_url(place) for place in places):
                if out is None:
                    raise UserError("the index of URLs needs a directory", fix="name one with --out")
                index = index_urls(places, out, opened, count, bad)
            elif len(places) > 1 or out is not None:
                raise UserError("one local directory is indexed, and its index lies in it", fix="leave out --out")
            else:
                index = index_directory(places[0], opened, progress=count, bad=bad)
        result = {
            "path": str(out or places[0]),
            "kind": index.kind,
            "shards": len(index.shards),
            "samples": index.samples,
            "tokens": index.tokens,
            "fingerprint": index.fingerprint,
            "skipped": bad.seen,
        }
        show(
            result,
            as_json,
            lambda value: f"{value['path']}: {value['samples']} {value['kind']} in {value['shards']} shards",
        )


@app.command("inspect")
def data_inspect(
    path: Annotated[Path, typer.Argument(help="A shard directory; with --shuffle also a run's YAML.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens of a sequence, to count them.")] = 1024,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Measure the order against a full permutation.")] = False,
    window: Annotated[int, typer.Option(min=1, help="data.shuffle_window, for --shuffle.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a step, for --shuffle.")] = 512,
    as_json: Json = False,
) -> None:
    """Show what a shard directory holds, or how well its order is shuffled."""
    with errors(as_json):
        if shuffle:
            _show_shuffle(path, context, window, batch, as_json)
            return
        from bigtrain.data.inspect import inspect

        found = inspect(path, context)
        show(found.as_json(), as_json, lines)


def _show_shuffle(path: Path, context: int, window: int, batch: int, as_json: bool) -> None:
    from dataclasses import asdict

    from bigtrain.data.index import load_index
    from bigtrain.data.order.sample_order import SampleOrder
    from bigtrain.data.order.shuffle_quality import shuffle_quality, table

    if path.suffix in (".yaml", ".yml"):
        from bigtrain.run import load_config
        from bigtrain.training.prepare import prepare

        prepared = prepare(load_config(path), verify=False)
        of = [place for place, index in enumerate(prepared.sources.indexes) for _ in index.shards]
        consumed = prepared.config.data.consumed
        start = 0 if consumed is None else consumed.step * prepared.batch_sequences
        found = shuffle_quality(prepared.order, prepared.batch_sequences, of, start)
    else:
        index = load_index(path)
        found = shuffle_quality(SampleOrder(0, index.fingerprint, index.sequence_counts(context), window), batch)
    show(asdict(found), as_json, lambda _: table(found))


@app.command("verify")
def data_verify(path: Annotated[Path, typer.Argument(help="A shard directory.")], as_json: Json = False) -> None:
    """Compare every byte of a shard directory with its index."""
    with errors(as_json):
        from bigtrain.data.inspect import verify

        found = verify(path)
        found.raise_for_problems()
        show(found.as_json(), as_json, lines)
