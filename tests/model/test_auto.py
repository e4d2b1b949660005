"""transformers' Auto classes know our models."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("first", ["cmmasksd", "transformers"])
def test_auto_classes(first: str, tiny_model_folder: Path):
    """In both orders of import, and importing cmmasksd loads nothing by itself."""
    imports = ["import cmmasksd", "from transformers import AutoConfig, AutoModel, AutoProcessor"]
    code = f"""
import sys
{imports[first == "transformers"]}
assert {first == "transformers"} or not {{"torch", "transformers", "numpy"}} & set(sys.modules)
{imports[first != "transformers"]}
assert "cmmasksd.model.modeling" not in sys.modules
kinds = [auto.from_pretrained({str(tiny_model_folder)!r}) for auto in (AutoProcessor, AutoConfig, AutoModel)]
assert [type(one) for one in kinds] == [cmmasksd.CMMaskSDProcessor, cmmasksd.CMMaskSDConfig, cmmasksd.CMMaskSDModel]
assert isinstance(AutoModel.from_config(kinds[1]), cmmasksd.CMMaskSDModel)
assert isinstance(AutoConfig.for_model("cmmasksd", decoder_width=64), cmmasksd.CMMaskSDConfig)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
