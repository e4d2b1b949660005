"""Files that ship with the package."""

from pathlib import Path


def tiny_clip() -> Path:
    """Folder of the small CLIP that `cmmasksd pretrain` made, in transformers' format (see its README.md)."""
    return Path(__file__).parent / "tiny-clip"
