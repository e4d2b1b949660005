"""CM-MaskSD: referring image segmentation with cross-modal masked self-distillation.

The public names are in __init__.pyi. They are loaded when they are first used, so that `import cmmasksd` and
`cmmasksd --help` stay fast.
"""

import lazy_loader

__version__ = "0.1.0.dev0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
