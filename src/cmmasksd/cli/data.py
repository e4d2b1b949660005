"""`cmmasksd data`: generated scenes as files, and sentences for annotated photographs."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmmasksd.config import MAX_REFERENCES, MAX_SCENE_SIZE
from cmmasksd.errors import UserError, require_between

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
    expressions = ArgumentParser(description="Write true sentences for instance segmentation in COCO's format.")
    add = expressions.add_argument
    add("--instances", type=Path, nargs="+", required=True, metavar="FILE", help="COCO instances.json, one or several")
    add(
        "--images",
        type=Path,
        nargs="+",
        default=None,
        metavar="FOLDER",
        help="image folder of each file, or one for all (default: `images` beside the file, or the file's folder)",
    )
    add("--out", type=Path, required=True, help="FILE.jsonl for a manifest, or a folder for a REFER release")
    add("--per_object", type=int, default=1, help="maximum number of different sentences per object")
    add("--keep", type=float, default=0.4, help="probability that a sentence says more than it must")
    add("--no_target", type=float, default=0.0, help="share of sentences that name nothing (manifest only)")
    add("--val", type=float, default=0.1, help="share of the images in the split val")
    add("--test", type=float, default=0.0, help="share of the images in the split test")
    add("--min_area", type=float, default=0.004, help="share of the image below which an object is not named")
    add("--synonyms", type=Path, default=None, metavar="FILE", help="YAML or JSON: class name to its nouns")
    add("--seed", type=int, default=0, help="seed of sentences and splits")
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
    require_between("--per_object", settings.per_object, 1, 20)
    for name in ("keep", "val", "test", "min_area"):
        require_between(f"--{name}", getattr(settings, name), 0, 1)
    require_between("--no_target", settings.no_target, 0, 0.9)
    if settings.val + settings.test >= 1:
        raise UserError(
            f"--val {settings.val} and --test {settings.test} leave no image to train on: give smaller ones"
        )
    manifest = settings.out.suffix.lower() == ".jsonl"
    if not manifest and settings.out.suffix.lower() in (".csv", ".json"):
        raise UserError(f"--out {settings.out} is neither FILE.jsonl nor a folder: choose one of them")
    if not manifest and settings.no_target:
        raise UserError(
            "--no_target needs a manifest, since a REFER release has no sentences that name nothing: "
            "give --out FILE.jsonl"
        )
    folders = settings.images or [None]
    if len(folders) not in (1, len(settings.instances)):
        raise UserError(f"--images has {len(folders)} folders for {len(settings.instances)} files: give one for each")
    from cmmasksd.data.expressions.dataset import Settings, generate, require_known, write_manifest
    from cmmasksd.data.expressions.instances import InstanceFile
    from cmmasksd.data.expressions.words import Vocabulary, read_synonyms
    from cmmasksd.data.readers.refer_release import write_refer_release

    folders = folders * len(settings.instances) if len(folders) == 1 else folders
    files = [InstanceFile(path, folder) for path, folder in zip(settings.instances, folders, strict=True)]
    synonyms = {}
    if settings.synonyms is not None:
        synonyms = read_synonyms(settings.synonyms)
        require_known(synonyms, files, settings.synonyms)
    for file in files:
        if file.image_folder is None:
            print(f"{file.path}: no image files found, colours are left out (name their folder with --images)")
            if not manifest:
                raise UserError(f"a REFER release holds the images of {file.path}: name their folder with --images")
    generated = generate(
        files,
        Settings(
            per_object=settings.per_object,
            keep=settings.keep,
            no_target=settings.no_target,
            val=settings.val,
            test=settings.test,
            min_area=settings.min_area,
            seed=settings.seed,
        ),
        Vocabulary(synonyms),
    )
    references = [reference for split in generated.splits for reference in split]
    named = sum(len(reference.expressions) for reference in references if reference.ann_ids)
    nothing = sum(not reference.ann_ids for reference in references)
    if manifest:
        write_manifest(settings.out, generated.splits)
    else:
        write_refer_release(settings.out, generated.splits)
    objects = len(references) - nothing
    images = len({reference.image_id for reference in references})
    print(
        f"{named} sentences for {objects} objects of {images} images, and {nothing} that name nothing: {settings.out}"
    )
    print("references: " + ", ".join(f"{split.split} {len(split)}" for split in generated.splits))
    if generated.left_out:
        print("not named: " + ", ".join(f"{why} ({count})" for why, count in generated.left_out.most_common()))
    print(f"train on them with --data.name {'manifest' if manifest else 'refcoco'} --data.root {settings.out}")
