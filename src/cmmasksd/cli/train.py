"""`cmmasksd train`: train a model."""

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import ConfigFile, add_config, config_names, is_main_process, run_config

HELP = "train a model"
DESCRIPTION = "Train a model. Settings come from --config and from single --keys."


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", action=ConfigFile, help=f"YAML file of settings, or the name of one: {', '.join(config_names())}"
    )
    add_config(parser)


def run(settings: Namespace) -> None:
    config = run_config(settings)
    from cmmasksd.training.loop import train

    scores = train(config)
    if is_main_process():
        print(
            f"last validation: oIoU {100 * scores['oIoU']:.2f}  mIoU {100 * scores['mIoU']:.2f}  "
            f"(best mIoU {100 * scores['best']:.2f}); models: {config.training.out}/best and last"
        )
