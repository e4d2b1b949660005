"""One value of one JSON file of a folder is replaced: what the fuzz tests of models and of exports share."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cmmasksd.errors import UserError
from cmmasksd.inference.base import BaseSegmenter

HOLE = "the value that is replaced"
# as they stand in the file: not all of them can be written by json.dumps
NASTY = [
    *("null", "[]", "{}", '""', "true", "-1", "0", "7", "0.5", "1e400", "-1e400", "NaN", str(2**31), str(2**70)),
    *('"/etc/passwd"', '"../x"', '"' + "x" * 10_000 + '"', '"\\ud800"', '"\\u0000\\n\\u001b[31m\\u202e"'),
    *("[1, 2, 3]", '{"a": {"b": [null]}}', "[" * 100_000 + "]" * 100_000, "1" * 5000),
]


@st.composite
def with_a_hole(draw: st.DrawFn, content: Any) -> Any:
    """A JSON value with one part of it, at any depth, replaced by HOLE or left out."""
    if not isinstance(content, dict | list) or not content or draw(st.integers(0, 9)) == 9:
        return HOLE
    content = copy.copy(content)
    key: Any = draw(st.sampled_from(sorted(content) if isinstance(content, dict) else range(len(content))))
    if isinstance(content[key], dict | list) and content[key]:
        content[key] = draw(with_a_hole(content[key]))
    elif draw(st.integers(0, 9)) == 0:
        del content[key]
    else:
        content[key] = HOLE
    return content


def check(load: Callable[[Path], BaseSegmenter], original: Path, copied: Path, name: str, data: st.DataObject) -> None:
    content = data.draw(with_a_hole(json.loads((original / name).read_text())))
    nasty = data.draw(st.sampled_from(NASTY))
    (copied / name).write_text(json.dumps(content).replace(json.dumps(HOLE), nasty), encoding="utf-8")
    try:
        load(copied).segment(np.zeros((9, 9, 3), np.uint8), "the red square")
    except UserError as error:
        message = str(error).replace(str(copied), "")
        assert 10 < len(message) < 500
        assert message.isprintable()
    finally:
        shutil.copyfile(original / name, copied / name)


FUZZ = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    database=None,
)
