"""Models that ship with the package, by the names that every command and `from_pretrained` know them by."""

from pathlib import Path

SHIPPED = {
    "photos": "photos-model",  # segmentation of photographs
    "tiny": "tiny-clip",  # the small CLIP that `cmmasksd pretrain` made
    "scenes": "scenes-model",  # segmentation of generated scenes, grown from it
}


def located(name: str | Path) -> str | Path:
    """The folder of a shipped model; any other folder or hub id as it is. A folder of the same name is "./scenes"."""
    return Path(__file__).parent / SHIPPED[name] if isinstance(name, str) and name in SHIPPED else name
