"""`cmmasksd pretrain`: train the small CLIP that the package ships.

Only maintainers need it, to replace the models that ship: `cmmasksd --help` does not list it.
"""

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import add_resume
from cmmasksd.config import PretrainConfig

HELP = "train the small CLIP that is shipped"
DESCRIPTION = "Train a small CLIP on generated scenes and their captions."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(PretrainConfig, "pretrain", skip={"resume"})
    add_resume(parser, "pretrain")


def run(settings: Namespace) -> None:
    from cmmasksd.pretraining.loop import pretrain

    print(f"the CLIP is in {pretrain(settings.pretrain)}")
