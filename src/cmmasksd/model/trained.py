"""A trained model and its processor by name: the kind of the model is that in config.json."""

from __future__ import annotations

from pathlib import Path

from cmmasksd.model.loading import load_backbone
from cmmasksd.model.locating import model_folder, model_type
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.clipseg import CLIPSegForImageSegmentation

TrainedModel = CMMaskSDModel | CLIPSegForImageSegmentation


def load_trained(name: str | Path) -> tuple[TrainedModel, CMMaskSDProcessor]:
    """Load a model of ours, or a CLIPSeg in transformers' format.

    Args:
        name: a folder, a hub id, or a shipped model.

    Raises:
        UserError: there is no such model, its files are incomplete or its weights do not fit its configuration.
    """
    if model_type(model_folder(name)) == "clipseg":
        model: TrainedModel = load_backbone(name, ("clipseg",))  # pyright: ignore (the family's network)
    else:
        model = CMMaskSDModel.from_pretrained(name)
    return model, CMMaskSDProcessor.from_pretrained(name)
