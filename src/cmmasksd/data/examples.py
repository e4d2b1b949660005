"""Example images for the first commands, with expressions that name their objects: photographs and generated scenes."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from cmmasksd.data.scenes.dataset import SceneDataset
from cmmasksd.errors import UserError

_SEED, _SCENE_SIZE, _SCENES = 20230519, 256, (0, 13, 14)
_PHOTOGRAPHS = {
    "chelsea.png": ("the cat",),
    "coffee.png": ("the cup",),
    "astronaut.png": ("the woman", "hair"),
}
"""File in scikit-image, all in the public domain (CC0, or NASA's) -> expressions."""


def photographs() -> list[tuple[Path, list[str]]]:
    """Photographs of scikit-image and expressions to try on them; none if it is not installed (extra `demo`)."""
    package = find_spec("skimage")  # not imported: that takes a second
    if package is None or package.origin is None:
        return []
    folder = Path(package.origin).parent / "data"
    return [(folder / name, list(texts)) for name, texts in _PHOTOGRAPHS.items() if (folder / name).is_file()]


def write_examples(out: Path) -> list[tuple[Path, list[str]]]:
    """Write the photographs, and scenes as shapes-1.png, shapes-2.png, …, into a folder.

    Args:
        out: the folder; made if missing.

    Returns:
        Each file, and expressions to try on it.

    Raises:
        UserError: a file of that name exists.
    """
    from PIL import Image

    photos = [(out / path.name, path, texts) for path, texts in photographs()]
    files = [out / f"shapes-{number}.png" for number in range(1, len(_SCENES) + 1)]
    if taken := [str(file) for file in (*(file for file, *_ in photos), *files) if file.exists()]:
        raise UserError(f"{taken[0]} already exists: choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file, path, texts in photos:
        shutil.copyfile(path, file)
        written.append((file, texts))
    data = SceneDataset("scenes", "val", 3 * (max(_SCENES) + 1), seed=_SEED, scene_size=_SCENE_SIZE)
    for file, scene in zip(files, _SCENES, strict=True):
        references = [data[index] for index in data.groups()[scene]]
        Image.fromarray(data.image(references[0])).save(file)
        written.append((file, [reference.expressions[0].text for reference in references]))
    return written
