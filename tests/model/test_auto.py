"""transformers' Auto classes know our models."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["CMMaskSDModel", "CMMaskSDProcessor", "CMMaskSDConfig"])
def test_auto_classes(name: str, tiny_model_folder: Path):
    """Any class of ours registers all of them; `import cmmasksd` by itself loads nothing."""
    code = f"""
import sys
import cmmasksd
assert not {{"torch", "transformers", "numpy"}} & set(sys.modules)
from transformers import AutoConfig, AutoModel, AutoProcessor
from cmmasksd import {name}
kinds = [auto.from_pretrained({str(tiny_model_folder)!r}) for auto in (AutoProcessor, AutoConfig, AutoModel)]
assert [type(one) for one in kinds] == [cmmasksd.CMMaskSDProcessor, cmmasksd.CMMaskSDConfig, cmmasksd.CMMaskSDModel]
assert isinstance(AutoModel.from_config(kinds[1]), cmmasksd.CMMaskSDModel)
assert isinstance(AutoConfig.for_model("cmmasksd", decoder_width=64), cmmasksd.CMMaskSDConfig)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
