"""The commands `bigtrain data`: pack, index, inspect and verify data sets."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from bigtrain.cli.common import Json, PluginOption, counting, errors, lines, load_plugins, show, stages

if TYPE_CHECKING:
    from bigtrain.data.accounting import PassedOver
    from bigtrain.data.index import ShardIndex
    from bigtrain.data.kind import SampleKind
    from bigtrain.data.tokenizers import Tokenizer

INPUTS = (
    "Text, JSON lines, Parquet, Arrow, MDS, tars of text, token files; also compressed (gzip, zstd, bzip2, xz); "
    "directories; patterns."
)
TOKENIZER = "bytes, a tokenizer.json, a SentencePiece .model, or a directory with one of them or with GPT-2's files."
BeginOfTextOption = Annotated[
    str,
    typer.Option(
        "--bos", help="Begin documents with the begin-of-text token: no, yes, or by the tokenizer's rule (rule)."
    ),
]

SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens", help="Encode the name of a special token in text, such as <|sep|>, as that token."
    ),
]

app = typer.Typer(help="Pack data into shards, index tars, inspect and verify both.", no_args_is_help=True)


EndOfText = Annotated[
    str | None, typer.Option(help="End-of-text token, if the tokenizer's directory does not name it.")
]
SkipBad = Annotated[int, typer.Option(min=0, help="Number of bad samples that are skipped and named.")]
KindOption = Annotated[
    str | None,
    typer.Option(
        "--kind",
        help="What samples are: tokens, supervised, images, captions, arrays, preferences, classified, or a plugin's.",
    ),
]
CaptionsOption = Annotated[
    bool, typer.Option("--captions", help="--kind captions: folders, tars, .jsonl; see the README.")
]
ArraysOption = Annotated[
    bool, typer.Option("--arrays", help="--kind arrays: NAME.npy files of all samples, or a folder of KEY.npy.")
]
ColumnsOption = Annotated[
    str | None, typer.Option(help="Keys of the columns, for --kind supervised: prompt=question,completion=answer.")
]
ChatTemplateOption = Annotated[
    Path | None, typer.Option(help="Jinja file used instead of the tokenizer's chat template.")
]
TokenTypeOption = Annotated[
    str | None, typer.Option(help="Type of the token ids in .bin files: uint16, uint32, and so on.")
]

ImagesOption = Annotated[
    bool, typer.Option("--images", help="--kind images: FOLDER/CLASS/NAME.png or .jpg, tars, Parquet.")
]
ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Resize images to squares with this many pixels a side.")
]


@app.command("pack")
def data_pack(
    inputs: Annotated[list[str], typer.Argument(help=INPUTS)],
    out: Annotated[Path, typer.Option(help="Output directory; gets train/ and validation/.")],
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER)] = None,
    eot: EndOfText = None,
    kind: KindOption = None,
    images: ImagesOption = False,
    captions: CaptionsOption = False,
    arrays: ArraysOption = False,
    image_size: ImageSizeOption = None,
    validation: Annotated[str, typer.Option(help="Share of the documents to hold out, such as 1%.")] = "0%",
    key: Annotated[str, typer.Option(help="The key of an object, or column, that holds the text: data.text.")] = "text",
    columns: ColumnsOption = None,
    chat_template: ChatTemplateOption = None,
    bos: BeginOfTextOption = "no",
    special_tokens: SpecialTokens = False,
    token_type: TokenTypeOption = None,
    shard_size: Annotated[str, typer.Option(help="Largest size of a shard.")] = "64 MiB",
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes; default: one per core.")] = None,
    skip_bad: SkipBad = 0,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Pack text, images or arrays into WebDataset shards; after a kill, the same command continues."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.config.units import parse_bytes
        from bigtrain.data.encoding.forms import parse_columns
        from bigtrain.data.formats.token_files import TOKEN_TYPES
        from bigtrain.data.kind import kind_named
        from bigtrain.data.packing.options import PackOptions

        load_plugins(plugin)
        chosen = kind_named(_one_kind(kind, {"images": images, "captions": captions, "arrays": arrays}))
        special = {"columns": columns, "chat_template": chat_template, "token_type": token_type}
        _refuse_options(chosen, {"tokenizer": tokenizer, "image_size": image_size, **special})
        if token_type is not None and token_type not in TOKEN_TYPES:
            raise UserError(f"{token_type!r} is not a token type", "--token-type", f"Use {', '.join(TOKEN_TYPES)}.")
        try:
            shard_bytes = parse_bytes(shard_size)
        except ValueError as error:
            raise UserError(str(error), "--shard-size") from None
        with stages() as progress:
            options = PackOptions(
                tokenizer=None if tokenizer is None else _tokenizer(tokenizer, eot, bos, special_tokens, chat_template),
                image_size=image_size,
                key=key,
                columns={} if columns is None else parse_columns(columns),
                token_type=token_type,
                validation=validation,
                shard_bytes=shard_bytes,
                skip_bad=skip_bad,
                workers=workers or len(os.sched_getaffinity(0)),
                progress=progress,
            )
            summary = chosen.pack(inputs, out, options)
        _show_passed(summary.passed, as_json)
        show(summary.as_json(), as_json, lambda found: _pack_text(found, chosen))


def _pack_text(summary: dict[str, Any], kind: SampleKind) -> str:
    """A summary as lines for users: samples have the kind's name, and numbers of text are only those of text."""
    splits = {}
    for name, split in summary["splits"].items():
        noun = "documents" if kind.unit == "tokens" else kind.unit
        has_text = bool(split["tokens"])
        splits[name] = {
            noun if key == "documents" else key: value
            for key, value in split.items()
            if has_text or key not in ("tokens", "characters")
        }
    shown = summary if any(split["tokens"] for split in summary["splits"].values()) else {**summary, "vocab_size": None}
    return lines({**shown, "splits": splits})


def _one_kind(kind: str | None, flags: dict[str, bool]) -> str:
    """The sample kind that --kind or the flag of a kind (--images, --captions, --arrays) names; default: tokens.

    Raises:
        UserError: The options name different kinds.
    """
    from bigtrain.config import UserError

    named = [*([kind] if kind else []), *(name for name, given in flags.items() if given and name != kind)]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} are different sample kinds", fix="Give one of them.")
    return named[0] if named else "tokens"


def _tokenizer(source: str, eot: str | None, bos: str, special: bool, chat_template: Path | None = None) -> Tokenizer:
    from bigtrain.config import UserError
    from bigtrain.data.encoding.rules import BeginOfText
    from bigtrain.data.tokenizers import Tokenizer

    if bos not in get_args(BeginOfText):
        raise UserError(f"--bos cannot be {bos!r}", fix=f"Use {', '.join(get_args(BeginOfText))}.")
    try:
        template = None if chat_template is None else chat_template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the chat template cannot be read: {error}", str(chat_template)) from None
    return Tokenizer.open(source, eot, cast("BeginOfText", bos), template, special)


def _show_passed(passed: PassedOver, as_json: bool) -> None:
    """Print which inputs and samples were not used."""
    for line in passed.lines():
        print(line, file=sys.stderr if as_json else sys.stdout)


def _refuse_options(kind: SampleKind, given: dict[str, object]) -> None:
    from bigtrain.config import UserError

    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        if value is not None and name not in kind.options:
            raise UserError(f"{option} does not apply to {kind.name}", fix=f"Omit {option}.")
    if kind.needs_tokenizer and given["tokenizer"] is None:
        raise UserError(f"packing {kind.name} needs a tokenizer", fix="Give one with --tokenizer, for example bytes.")


@app.command("tokenizer")
def data_tokenizer(
    inputs: Annotated[list[str], typer.Argument(help=INPUTS)],
    out: Annotated[Path, typer.Option(help="File to write, a tokenizer.json.")],
    vocab: Annotated[int | None, typer.Option(help="Size of the vocabulary, for bpe.")] = None,
    kind: Annotated[str, typer.Option(help="bpe of bytes, or characters: one token for each.")] = "bpe",
    key: Annotated[str, typer.Option(help="The key of an object, or column, that holds the text: data.text.")] = "text",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on text: a byte-level BPE, or one token for each character."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.data.encoding.learned import characters_of, train_bpe
        from bigtrain.data.formats.documents import documents

        if kind not in ("bpe", "characters") or (kind == "bpe") != (vocab is not None):
            raise UserError("--kind bpe needs --vocab, and --kind characters does not take it")
        found = documents(inputs, key)
        learned = characters_of(found, out) if vocab is None else train_bpe(found, vocab, out)
        result = {"out": str(out), "vocab_size": learned.vocab_size}
        show(result, as_json, lambda value: f"{value['out']}: {value['vocab_size']} tokens")


@app.command("index")
def data_index(
    places: Annotated[list[str], typer.Argument(help="Directory of tars from another tool, or URLs of tars.")],
    out: Annotated[
        Path | None, typer.Option(help="For URLs: output directory of the index, which must not exist.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of text, or the one that made the tokens.")] = None,
    eot: EndOfText = None,
    bos: BeginOfTextOption = "no",
    special_tokens: SpecialTokens = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Sample kind, if the members' names do not determine it.")
    ] = None,
    skip_bad: SkipBad = 0,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Index tars that other programs made, so that runs can read them."""
    with errors(as_json):
        from bigtrain.config import UserError
        from bigtrain.config.urls import is_url
        from bigtrain.data.accounting import PassedOver
        from bigtrain.data.indexing import index_directory, index_urls

        load_plugins(plugin)
        passed = PassedOver(skip_bad)
        opened = None if tokenizer is None else _tokenizer(tokenizer, eot, bos, special_tokens)
        with counting("indexing") as count:
            if any(is_url(place) for place in places):
                if out is None:
                    raise UserError("the index of URLs needs a directory", fix="Give one with --out.")
                index = index_urls(places, out, opened, count, passed, kind=kind)
            elif len(places) > 1 or out is not None:
                raise UserError(
                    "--out is only for URLs: the index of a local directory is written into it", fix="Remove --out."
                )
            else:
                index = index_directory(places[0], opened, progress=count, passed=passed, kind=kind)
        result = {
            "path": str(out or places[0]),
            "kind": index.kind,
            "shards": len(index.shards),
            "samples": index.samples,
            "tokens": index.tokens,
            "fingerprint": index.fingerprint,
            **passed.as_json(),
        }
        _show_passed(passed, as_json)
        show(
            result,
            as_json,
            lambda value: f"{value['path']}: {_counted(index)} in {value['shards']} shards",
        )


def _counted(index: ShardIndex) -> str:
    """The numbers of samples and tokens of an index, as "10 documents (2,906 tokens)"."""
    kind = index.sample_kind
    noun = "documents" if kind.unit == "tokens" else kind.unit
    return f"{index.samples:,} {noun}" + (f" ({index.tokens:,} tokens)" if index.of_tokens else "")


@app.command("inspect")
def data_inspect(
    path: Annotated[Path, typer.Argument(help="A shard directory; with --shuffle also a run's YAML.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence, to count sequences.")] = 1024,
    shuffle: Annotated[
        bool, typer.Option("--shuffle", help="Compare the order of samples with a full permutation.")
    ] = False,
    window: Annotated[int, typer.Option(min=1, help="Value of data.shuffle_window, for --shuffle.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Sequences per step, for --shuffle.")] = 512,
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Show the content of a shard directory, or how well its sample order is shuffled."""
    with errors(as_json):
        load_plugins(plugin)
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
def data_verify(
    path: Annotated[Path, typer.Argument(help="A shard directory.")],
    plugin: PluginOption = None,
    as_json: Json = False,
) -> None:
    """Compare every byte of a shard directory with its index."""
    with errors(as_json):
        load_plugins(plugin)
        from bigtrain.data.inspect import verify

        found = verify(path)
        found.raise_for_problems()
        show(found.as_json(), as_json, lines)


@app.command("overlap")
def data_overlap(
    train: Annotated[Path, typer.Argument(help="Shards or files of training text.")],
    validation: Annotated[
        Path, typer.Argument(help="Shards or files of held-out text; the result is stored with shards.")
    ],
    as_json: Json = False,
) -> None:
    """Find passages of held-out text that also occur in the training text: exact, near and shifted copies."""
    with errors(as_json):
        from bigtrain.data.overlap import overlap, record

        with counting("documents of the training text") as count:
            found = overlap(train, validation, count)
        file = record(found, validation)
        show({**found, "file": str(file) if file else None}, as_json, _overlap_text)


def _overlap_text(found: dict[str, Any]) -> str:
    text = [
        f"{found['share']:.2%} of {found['passages']:,} passages of {found['validation']} are in {found['train']} too: "
        f"{found['exact']} exact copies, {found['near']} near ones ({found['rule']})"
    ]
    for one in found["found"][:10]:
        text.append(
            f"  {one['document']}, word {one['word']}: {one['share']:.0%} of it at {one['train_document']}, about word "
            f"{one['train_word']}"
        )
    if len(found["found"]) > 10:
        text.append(f"  and {found['exact'] + found['near'] - 10} more; --json lists up to {len(found['found'])}")
    if found["share"] > 0:
        text.append("warning: a held-out loss on these passages is too low; pack the held-out text again without them")
    return "\n".join([*text, *([found["file"]] if found["file"] else [])])
