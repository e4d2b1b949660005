"""docs/notebook.ipynb: valid, saved without outputs, and every cell runs as a reader runs it."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parent.parent / "docs" / "notebook.ipynb"


def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_a_notebook_without_outputs():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """In one namespace; the value of a cell's last line is what a notebook shows."""
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for nth, cell in enumerate(cells()):
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]), f"cell {nth}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"cell {nth}", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {nth}", "eval"), space)  # pyright: ignore
            if value is not None:
                shown.append(value)
    assert len(shown) == 4
    assert all(isinstance(value, Image.Image) for value in shown)
    assert all(segmentation.mask.any() for segmentation in space["segmentations"])
    said = capsys.readouterr().out
    assert all(sentence in said for sentence in space["sentences"])
    assert {file.name for file in (tmp_path / "labelled").iterdir()} == {"image.png", "image.json"}
