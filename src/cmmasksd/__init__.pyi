from .config import ScoreConfig as ScoreConfig
from .errors import UserError as UserError
from .evaluation.compare import compare_results as compare_results
from .evaluation.report import report as report
from .evaluation.score import score as score
from .inference.base import Segmentation as Segmentation
from .inference.formats import overlay_all as overlay_all
from .inference.formats import to_coco as to_coco
from .inference.formats import to_detections as to_detections
from .inference.formats import to_labelme as to_labelme
from .inference.predictor import Segmenter as Segmenter
from .model.auto import CMMaskSDConfig as CMMaskSDConfig
from .model.auto import CMMaskSDModel as CMMaskSDModel
from .model.auto import CMMaskSDProcessor as CMMaskSDProcessor
from .publishing.hub import publish as publish
from .publishing.hub import push_to_hub as push_to_hub

__version__: str
