"""Example images for the first commands: generated scenes, with expressions that name their objects."""

from __future__ import annotations

from pathlib import Path

from cmmasksd.data.scenes.dataset import SceneDataset
from cmmasksd.errors import UserError

_SEED, _SCENE_SIZE, _SCENES = 20230519, 256, (0, 13, 14)


def write_examples(out: Path) -> list[tuple[Path, list[str]]]:
    """Write shapes-1.png, shapes-2.png, … into a folder.

    Args:
        out: the folder; made if missing.

    Returns:
        Each file, and an expression for each of three objects in it.

    Raises:
        UserError: a file of that name exists.
    """
    from PIL import Image

    data = SceneDataset("scenes", "val", 3 * (max(_SCENES) + 1), seed=_SEED, scene_size=_SCENE_SIZE)
    files = [out / f"shapes-{number}.png" for number in range(1, len(_SCENES) + 1)]
    if taken := [str(file) for file in files if file.exists()]:
        raise UserError(f"{taken[0]} already exists: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file, scene in zip(files, _SCENES, strict=True):
        references = [data[index] for index in data.groups()[scene]]
        Image.fromarray(data.image(references[0])).save(file)
        written.append((file, [reference.expressions[0].text for reference in references]))
    return written
