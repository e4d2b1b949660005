"""`cmmasksd data scenes`: generated scenes as files."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE
from cmmasksd.errors import require_between

HELP = "write generated scenes to files"
DESCRIPTION = "Make and look at data."


def add_options(parser: ArgumentParser) -> None:
    kinds = parser.add_subcommands(dest="kind", required=True)
    scenes = ArgumentParser(
        description="Write generated scenes as a REFER release: refs(unc).p, instances.json, images."
    )
    scenes.add_argument("--out", type=Path, required=True, help="folder for the release")
    scenes.add_argument("--name", type=Literal["scenes", "scenes+", "scenesg"], default="scenes", help="style")
    scenes.add_argument("--train", type=int, default=1500, help="references of the training split")
    scenes.add_argument("--test", type=int, default=300, help="references of val, testA and testB each")
    scenes.add_argument("--seed", type=int, default=0, help="of the scenes")
    scenes.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    kinds.add_subcommand("scenes", scenes, help="write generated scenes as a REFER release")


def run(settings: Namespace) -> None:
    scenes = settings.scenes
    require_between("--train", scenes.train, 1, MAX_REFERENCES)
    require_between("--test", scenes.test, 1, MAX_REFERENCES)
    require_between("--size", scenes.size, 64, MAX_SCENE_SIZE)
    from cmmasksd.data.readers.refer_release import write_refer_release
    from cmmasksd.data.scenes import SceneDataset

    counts = {"train": scenes.train, "val": scenes.test, "testA": scenes.test, "testB": scenes.test}
    scene = {"seed": scenes.seed, "scene_size": scenes.size}
    splits = [SceneDataset(scenes.name, split, count, **scene) for split, count in counts.items()]
    write_refer_release(scenes.out, splits)
    print(f"{sum(map(len, splits))} references in {scenes.out}; read them with --data refcoco --root {scenes.out}")
