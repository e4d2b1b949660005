"""`cmmasksd pretrain`: train the small CLIP that the package ships."""

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.config import PretrainConfig

HELP = "train the small CLIP that the package ships"
DESCRIPTION = "Train a small CLIP on generated scenes and their captions."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--config", action="config", help="YAML file of settings")
    parser.add_class_arguments(PretrainConfig, "pretrain")


def run(settings: Namespace) -> None:
    from cmmasksd.pretraining.loop import pretrain

    print(f"the CLIP is in {pretrain(settings.pretrain)}")
