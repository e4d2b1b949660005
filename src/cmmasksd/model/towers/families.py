"""The families of dual encoders, by the `model_type` of their config.json.

Our config.json nests the configuration of the backbone under `<model_type>_config`, and the names of its weights begin
with `<model_type>.`.
"""

from __future__ import annotations

from cmmasksd.model.towers.base import Family
from cmmasksd.model.towers.clip import CLIP
from cmmasksd.model.towers.clipseg import CLIPSEG
from cmmasksd.model.towers.lite import LITE
from cmmasksd.model.towers.resnet import CLIP_RESNET
from cmmasksd.model.towers.siglip import SIGLIP

FAMILIES: dict[str, Family] = {"clip": CLIP, "siglip": SIGLIP, "lite": LITE, "clip_resnet": CLIP_RESNET}
NETWORKS: dict[str, Family] = {**FAMILIES, "clipseg": CLIPSEG}
"""These, and the network of others that segments by itself."""
