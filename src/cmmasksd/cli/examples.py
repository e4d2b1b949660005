"""`cmmasksd examples`: images to try the commands on."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

HELP = "write example images"
DESCRIPTION = (
    "Write example images, and print sentences to try on them: generated scenes for --model scenes and, with the extra "
    "`demo`, photographs."
)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the images")


def run(settings: Namespace) -> None:
    from cmmasksd.data.examples import write_examples

    for file, sentences in write_examples(settings.out):
        print(f"{file}: {', '.join(map(repr, sentences))}")
