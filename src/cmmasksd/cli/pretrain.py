"""`cmmasksd pretrain`: train the small CLIP that the package ships.

Only maintainers need it, to replace the models that ship: `cmmasksd --help` does not list it.
"""

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.config import PretrainConfig

HELP = "train the small CLIP that the package ships"
DESCRIPTION = "Train a small CLIP on generated scenes and their captions."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_argument("--resume", action="store_true", help="resume the run in pretrain.out")
    parser.add_class_arguments(PretrainConfig, "pretrain")


def run(settings: Namespace) -> None:
    from cmmasksd.pretraining.loop import pretrain

    settings.pretrain.resume |= settings.resume
    print(f"the CLIP is in {pretrain(settings.pretrain)}")
