"""AutoConfig, AutoModel and AutoProcessor know our models once `import cmmasksd` has run, which still loads nothing.

transformers registers classes, and ours need torch. So two stand-ins with the names of our classes are registered in
their place; they load the real ones when they are called. transformers' own modules may be loaded before `import
cmmasksd` or after: those that are there get the stand-ins at once, the others when their import has ended.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

MODEL_TYPE = "cmmasksd"


class CMMaskSDConfig:
    """Stands for the configuration: makes a real one, once the model is registered with AutoModel."""

    model_type = MODEL_TYPE

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return _real()(*args, **kwargs)

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return _real().from_dict(*args, **kwargs)


def _real() -> Any:
    import cmmasksd.model.modeling as modeling  # it registers itself

    return modeling.CMMaskSDConfig


class CMMaskSDProcessor:
    """Stands for the processor."""

    @classmethod
    def from_pretrained(cls, name: Any, **kwargs: Any) -> Any:
        from cmmasksd.model.processing import CMMaskSDProcessor

        hub = {key: value for key, value in kwargs.items() if key not in ("trust_remote_code", "_from_auto")}
        return CMMaskSDProcessor.from_pretrained(name, **hub)


_REGISTER = {
    "transformers.models.auto.configuration_auto": lambda module: module.AutoConfig.register(
        MODEL_TYPE, CMMaskSDConfig, exist_ok=True
    ),
    "transformers.models.auto.processing_auto": lambda module: module.AutoProcessor.register(
        CMMaskSDConfig, CMMaskSDProcessor, exist_ok=True
    ),
}


class _AfterImport(MetaPathFinder):
    """Registers when transformers' module has run; knows no other module."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in _REGISTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            _REGISTER[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Make transformers know our models, now or when it is imported."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for name, do in _REGISTER.items():
        if name in sys.modules:
            do(sys.modules[name])
