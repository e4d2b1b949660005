"""`cmmasksd data`: generated scenes as files, and sentences for annotated photographs."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.cli.options import field_values
from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE, ExpressionConfig
from cmmasksd.errors import require_between

HELP = "write generated scenes, or sentences for annotated images"
DESCRIPTION = "Write data sets: generated scenes, or sentences for annotated images."


def add_options(parser: ArgumentParser) -> None:
    kinds = parser.add_subcommands(dest="kind", required=True)
    scenes = ArgumentParser(
        description="Write generated scenes as a REFER release: refs(unc).p, instances.json, images."
    )
    scenes.add_argument("--out", type=Path, required=True, help="folder for the release")
    scenes.add_argument("--name", type=Literal["scenes", "scenes+", "scenesg"], default="scenes", help="style")
    scenes.add_argument("--train", type=int, default=1500, help="number of references in train")
    scenes.add_argument("--test", type=int, default=300, help="number of references in each of val, testA and testB")
    scenes.add_argument("--seed", type=int, default=0, help="seed of the scenes")
    scenes.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    kinds.add_subcommand("scenes", scenes, help="write generated scenes as a REFER release")
    expressions = ArgumentParser(description="Write true sentences for masks with class names.")
    add = expressions.add_argument
    add(
        "--instances",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="annotations, one or several: COCO or Label Studio (.json), CVAT for images (.xml), YOLO segmentation "
        "(data.yaml or its folder), folder of labelme files",
    )
    add(
        "--images",
        type=Path,
        nargs="+",
        default=None,
        metavar="FOLDER",
        help="image folder of each file, or one for all (default: `images` beside the file, or the file's folder)",
    )
    add("--out", type=Path, required=True, help="FILE.jsonl for a manifest, or a folder for a REFER release")
    add("--synonyms", type=Path, default=None, metavar="FILE", help="YAML or JSON: class name to its nouns")
    expressions.add_class_arguments(ExpressionConfig)
    kinds.add_subcommand("expressions", expressions, help="write true sentences for masks with class names")


def run(settings: Namespace) -> None:
    if settings.kind == "scenes":
        _scenes(settings.scenes)
    else:
        _expressions(settings.expressions)


def _scenes(settings: Namespace) -> None:
    require_between("--train", settings.train, 1, MAX_REFERENCES)
    require_between("--test", settings.test, 1, MAX_REFERENCES)
    require_between("--size", settings.size, 64, MAX_SCENE_SIZE)
    from cmmasksd.data.readers.refer_release import write_refer_release
    from cmmasksd.data.scenes import SceneDataset

    counts = {"train": settings.train, "val": settings.test, "testA": settings.test, "testB": settings.test}
    scene = {"seed": settings.seed, "scene_size": settings.size}
    splits = [SceneDataset(settings.name, split, count, **scene) for split, count in counts.items()]
    write_refer_release(settings.out, splits)
    print(f"{sum(map(len, splits))} references in {settings.out}; read them with --data refcoco --root {settings.out}")


def _expressions(settings: Namespace) -> None:
    config = ExpressionConfig(**field_values(ExpressionConfig, settings))
    from cmmasksd.data.expressions.writing import write_expressions

    images = settings.images or ()
    print(write_expressions(settings.instances, settings.out, config, images=images, synonyms=settings.synonyms))
