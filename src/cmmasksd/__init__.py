"""CM-MaskSD: referring image segmentation with cross-modal masked self-distillation.

The names below are loaded when they are first used, so that `import cmmasksd` and `cmmasksd --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmmasksd.config import ScoreConfig as ScoreConfig
    from cmmasksd.errors import UserError as UserError
    from cmmasksd.evaluation.compare import compare_results as compare_results
    from cmmasksd.evaluation.report import report as report
    from cmmasksd.evaluation.score import score as score
    from cmmasksd.inference.base import Segmentation as Segmentation
    from cmmasksd.inference.formats import overlay_all as overlay_all
    from cmmasksd.inference.formats import to_coco as to_coco
    from cmmasksd.inference.formats import to_detections as to_detections
    from cmmasksd.inference.formats import to_labelme as to_labelme
    from cmmasksd.inference.predictor import Segmenter as Segmenter
    from cmmasksd.model.auto import CMMaskSDConfig as CMMaskSDConfig
    from cmmasksd.model.auto import CMMaskSDModel as CMMaskSDModel
    from cmmasksd.model.auto import CMMaskSDProcessor as CMMaskSDProcessor
    from cmmasksd.publishing.hub import publish as publish
    from cmmasksd.publishing.hub import push_to_hub as push_to_hub

__version__ = "0.1.0.dev0"

_HOME = {
    "UserError": "cmmasksd.errors",
    "Segmentation": "cmmasksd.inference.base",
    "Segmenter": "cmmasksd.inference.predictor",
    "overlay_all": "cmmasksd.inference.formats",
    "to_coco": "cmmasksd.inference.formats",
    "to_detections": "cmmasksd.inference.formats",
    "to_labelme": "cmmasksd.inference.formats",
    "CMMaskSDConfig": "cmmasksd.model.auto",
    "CMMaskSDModel": "cmmasksd.model.auto",
    "CMMaskSDProcessor": "cmmasksd.model.auto",
    "ScoreConfig": "cmmasksd.config",
    "score": "cmmasksd.evaluation.score",
    "compare_results": "cmmasksd.evaluation.compare",
    "report": "cmmasksd.evaluation.report",
    "publish": "cmmasksd.publishing.hub",
    "push_to_hub": "cmmasksd.publishing.hub",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
