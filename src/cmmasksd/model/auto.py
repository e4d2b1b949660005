"""Registers our classes with transformers' AutoConfig, AutoModel and AutoProcessor, as a plug-in does when imported.

`from cmmasksd import CMMaskSDModel` (or the processor, or the configuration) imports this module.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from cmmasksd.model.configuration import CMMaskSDConfig
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor

__all__ = ["CMMaskSDConfig", "CMMaskSDModel", "CMMaskSDProcessor"]

AutoConfig.register(CMMaskSDConfig.model_type, CMMaskSDConfig)
AutoModel.register(CMMaskSDConfig, CMMaskSDModel)
AutoProcessor.register(CMMaskSDConfig, CMMaskSDProcessor)
