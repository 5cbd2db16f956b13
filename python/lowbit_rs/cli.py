"""The command ``lowbit``: convert files, look into them, write text with models, and a demonstration.

Exit codes: 0; 1 after an error, with one line on stderr; 2 where the command line cannot be understood; 130 after
Ctrl-C and 143 after SIGTERM. In all cases an output is complete or absent.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from lowbit_rs.errors import LowbitError

if TYPE_CHECKING:
    from types import FrameType

    from rich.console import Console

    from lowbit_rs.files import Inspection, Progress, Summary

_INTERRUPTED = 128 + signal.SIGINT
_EXAMPLES = 3
_DTYPES = ("float32", "float16", "bfloat16")


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM; no `Exception`, so that nothing but the removal of unfinished outputs stops it."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Group(click.Group):
    """A group of commands whose errors are one line on stderr, and which cleans up after SIGTERM, too."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and exits."""
        kwargs["standalone_mode"] = False
        try:
            with _sigterm_as_exception():
                code = super().main(*args, **kwargs)
            sys.exit(code if isinstance(code, int) else 0)
        except _Stopped as stopped:
            _fail(str(stopped), stopped.exit_code)
        except click.Abort:  # Ctrl-C in a command that runs another command line of click's
            _fail("interrupted", _INTERRUPTED)
        except click.UsageError as error:
            command = "lowbit" if error.ctx is None else error.ctx.command_path
            _fail(f"{error.format_message()} (see {command} --help)", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except BrokenPipeError:
            # The reader of our output has seen enough, as in `lowbit inspect model | head`. What is still buffered goes
            # nowhere, or the interpreter would complain about the pipe at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            place = f"{error.filename}: " if error.filename is not None else ""
            _fail(f"{place}{error.strerror or error}", 1)
        except LowbitError as error:
            _fail(str(error), 1)
        except MemoryError:
            _fail("out of memory", 1)
        except Exception as error:
            if os.environ.get("LOWBIT_TRACEBACK"):
                raise
            _fail(f"{type(error).__name__}: {error} (set LOWBIT_TRACEBACK=1 to see where)", 1)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command. Ctrl-C does not get as far as click, which would add an empty line to ours."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _Stopped("interrupted", _INTERRUPTED) from None


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise _Stopped("terminated", 128 + signal.SIGTERM)

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread, which alone may set handlers and gets signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail(message: str, code: int) -> NoReturn:
    line = " ".join(line.strip() for line in message.splitlines())
    click.echo(f"error: {_printable(line)}", err=True)
    sys.exit(code)


def _printable(text: str) -> str:
    """`text` with escapes in place of control characters: names in files come from strangers."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _block_size(text: str) -> int | str:
    if text != "row" and not text.isdecimal():
        raise click.BadParameter(f"got {text!r}, expected a power of two from 16 to 4096, or row")
    return text if text == "row" else int(text)


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        import lowbit_rs

        click.echo(f"lowbit {lowbit_rs.__version__}")
        ctx.exit()


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Store the weights of PyTorch models in 4 or 8 bits."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("destination", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["nf4", "fp4", "int4", "uint4", "int8", "uint8"]),
    default="nf4",
    show_default=True,
    help="The code values.",
)
@click.option(
    "--block-size",
    type=_block_size,
    metavar="N|row",
    default="64",
    show_default=True,
    help="Weights that share a scale: a power of two from 16 to 4096, or a row.",
)
@click.option("--double-quant", is_flag=True, help="Store scales in 8 bits.")
@click.option("--scale-dtype", type=click.Choice(_DTYPES), default="float32", show_default=True, help="Of scales.")
@click.option(
    "--codebook",
    type=click.Choice(["block-optimal", "fit"]),
    help="In place of a format: 16 values that are best for normal weights at this block size, or for each tensor.",
)
@click.option("--signed-absmax", is_flag=True, help="With --codebook: scales carry a sign (BOF4-S).")
@click.option(
    "--skip",
    multiple=True,
    metavar="PATTERN",
    default=("lm_head",),
    show_default=True,
    help="Modules that stay as they are: whole components at an end of the name, or a pattern with * ? [] for all of "
    "it. Repeat for several. Takes the place of the default.",
)
@click.option("--embeddings", is_flag=True, help="Quantize embeddings, too.")
@click.option(
    "--nonfinite",
    type=click.Choice(["error", "propagate"]),
    default="error",
    show_default=True,
    help="What to do with NaN and infinities.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use. By default, as many as torch uses.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def quantize(source: Path, destination: Path, threads: int | None, scale_dtype: str, **options: Any) -> None:
    """Quantize the linear weights of a model.

    IN is a safetensors file or a model directory, and OUT becomes the same. All other tensors and files are carried
    over unchanged. OUT is complete or absent, whatever happens.
    """
    import torch

    from lowbit_rs.files import quantize_file

    if threads is not None:
        torch.set_num_threads(threads)
    options["scale_dtype"] = getattr(torch, scale_dtype)
    with _progress_bar("quantize") as progress:
        summary = quantize_file(source, destination, **options, progress=progress)
    _print_summary("quantized", summary)


@main.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("destination", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the weights. By default, that before quantization.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def dequantize(source: Path, destination: Path, dtype: str | None, force: bool) -> None:
    """Turn quantized weights back into float weights.

    IN is what `lowbit quantize` wrote. OUT has the names, shapes and dtypes that there were before.
    """
    import torch

    from lowbit_rs.files import dequantize_file

    with _progress_bar("dequantize") as progress:
        torch_dtype = None if dtype is None else getattr(torch, dtype)
        summary = dequantize_file(source, destination, torch_dtype, force=force, progress=progress)
    _print_summary("dequantized", summary)


@main.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.argument("destination", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["native", "bitsandbytes"]),
    default="native",
    show_default=True,
    help="The layout of OUT: files of lowbit_rs, or, from these, bitsandbytes' (nf4, fp4 and int8).",
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def convert(source: Path, destination: Path, to: str, force: bool) -> None:
    """Rewrite a quantized model of another library.

    IN is a model directory of bitsandbytes, GPTQ, AWQ or compressed-tensors, or a file of bitsandbytes. OUT becomes the
    same with the same weights: they are not quantized anew.
    """
    from lowbit_rs.integrations.checkpoints import convert_file

    with _progress_bar("convert") as progress:
        summary = convert_file(source, destination, to, force=force, progress=progress)
    _print_summary("converted", summary)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """List the tensors of a file or model directory.

    Shows formats, bits per weight and sizes. Reads headers only.
    """
    from lowbit_rs.files import inspect as inspect_path

    inspection = inspect_path(path)
    if as_json:
        click.echo(json.dumps(_as_dict(inspection), indent=2))
    else:
        _print_inspection(inspection)


@main.command()
@click.argument("model", metavar="MODEL")
@click.option("--prompt", required=True, help="The question; a text to be continued with --raw.")
@click.option("--raw", is_flag=True, help="Take the prompt as it is, even if the model has a template for chats.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Where to stop.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the likeliest token; above, tokens are drawn.",
)
@click.option("--device", default="cpu", show_default=True, help="Where the model runs.")
@click.option(
    "--dtype", type=click.Choice(("auto", *_DTYPES)), default="auto", show_default=True, help="Of activations."
)
def generate(model: str, prompt: str, raw: bool, **options: Any) -> None:
    """Answer a prompt with a language model.

    MODEL is a model directory or an id on the Hub, with its tokenizer. Text is printed as it is written. Needs the
    extra: pip install 'lowbit-rs[transformers]'.
    """
    _require_transformers("generate")
    from lowbit_rs.integrations.transformers.text import generate_text

    generate_text(model, prompt, lambda text: click.echo(text, nl=False), chat=False if raw else None, **options)


@main.command()
@click.argument("model", metavar="MODEL")
@click.option("--host", default="localhost", show_default=True, help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port to listen at.")
@click.option("--device", default="auto", show_default=True, help="Where the model runs.")
@click.option(
    "--dtype", type=click.Choice(("auto", *_DTYPES)), default="auto", show_default=True, help="Of activations."
)
def serve(model: str, **options: Any) -> None:
    """Serve a language model over HTTP, as OpenAI's API.

    MODEL is a model directory or an id on the Hub, with its tokenizer. The server is that of transformers. Needs the
    extra: pip install 'lowbit-rs[serve]'.
    """
    _require_transformers("serve")
    from lowbit_rs.integrations.transformers.text import serve_model

    serve_model(model, **options)


def _require_transformers(command: str) -> None:
    from importlib.util import find_spec

    if find_spec("transformers") is None:
        extra = "serve" if command == "serve" else "transformers"
        raise click.ClickException(f'lowbit {command}: transformers not installed: pip install "lowbit-rs[{extra}]"')


@main.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def demo(arguments: Sequence[str]) -> int:
    """Quantize a small language model to each format and compare.

    Needs the extra: pip install 'lowbit-rs[demo]'. See `lowbit demo --help`.
    """
    from lowbit_rs.demo import main as run

    return run(arguments)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Into a pipe or file no line is cut or wrapped. Names may hold what rich would take for markup or emoji.
    width = None if stream.isatty() else 10_000
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@contextmanager
def _progress_bar(description: str) -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar
    from rich.table import Column

    console = _console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),
        DownloadColumn(table_column=Column(no_wrap=True)),
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[tensor]}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
    )
    with Bar(*columns, console=console, expand=True, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None, tensor="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, tensor=_printable(name))

        yield advance


def _print_summary(verb: str, summary: Summary) -> None:
    from lowbit_rs.packed import format_bytes

    before, after = format_bytes(summary.bytes_before), format_bytes(summary.bytes_after)
    click.echo(f"{verb} {_count(len(summary.converted), 'tensor')}: {before} -> {after}")
    reasons: dict[str, list[str]] = {}
    for name, reason in summary.skipped.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        examples = ", ".join(map(_printable, names[:_EXAMPLES])) + (", ..." if len(names) > _EXAMPLES else "")
        click.echo(f"  kept {len(names)} as {'they are' if len(names) > 1 else 'it is'} ({reason}): {examples}")
    if summary.copied_files:
        click.echo(f"  copied {_count(len(summary.copied_files), 'other file')}")
    for path in summary.leftovers:
        click.echo(f"  note: {_printable(str(path))} is of another run; if that was killed, it can be deleted")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _print_inspection(inspection: Inspection) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from lowbit_rs.packed import format_bytes

    table = Table(box=SIMPLE_HEAD, show_footer=True, pad_edge=False)
    files = {tensor.file for tensor in inspection.tensors}
    total = f"{_count(len(inspection.tensors), 'tensor')}, {_count(max(1, len(files)), 'file')}"
    table.add_column("tensor", total, overflow="fold", min_width=len(total))
    table.add_column("shape", no_wrap=True)
    table.add_column("stored as", overflow="fold")
    table.add_column("bits/weight", f"{inspection.bits_per_weight:.3f}", justify="right", no_wrap=True)
    table.add_column("size", format_bytes(inspection.nbytes), justify="right", no_wrap=True)
    for tensor in inspection.tensors:
        table.add_row(
            _printable(tensor.name),
            " x ".join(map(str, tensor.shape)) or "scalar",
            tensor.format or tensor.dtype,
            f"{tensor.bits_per_weight:.3f}",
            format_bytes(tensor.nbytes),
        )
    console = _console()
    console.print(table)
    if inspection.foreign_scheme is not None:
        console.print(f"quantized by {_printable(inspection.foreign_scheme)}")


def _as_dict(inspection: Inspection) -> Mapping[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            "file": tensor.file,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "format": tensor.format,
            "weights": tensor.weights,
            "bits_per_weight": tensor.bits_per_weight,
            "bytes": tensor.nbytes,
        }
        for tensor in inspection.tensors
    ]
    return {
        "path": str(inspection.path),
        "tensors": tensors,
        "weights": inspection.weights,
        "bits_per_weight": inspection.bits_per_weight,
        "bytes": inspection.nbytes,
        "foreign_scheme": inspection.foreign_scheme,
    }
