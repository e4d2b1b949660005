"""Writes docs/api.md, the API reference, from the docstrings. The source is parsed, nothing is imported.

python docs/make_api.py [docs/api.md]
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "cmmasksd"
MODULES = {  # in the order of the page; all public classes and functions of each
    "Segment": ("inference.predictor", "inference.base", "inference.formats", "inference.onnx",
                "inference.export_settings", "export.export"),
    "Model": ("model.modeling", "model.configuration", "model.processing", "model.locating",
              "publishing.card", "publishing.hub"),
    "Data": ("data.samples", "data.datasets", "data.readers.manifest", "data.readers.refer",
             "data.readers.refer_release", "data.scenes.dataset", "data.masks", "data.images"),
    "Train": ("config", "training.loop", "training.build", "pretraining.loop"),
    "Distil": ("distillation.objective", "model.correlation", "distillation.masking", "distillation.losses"),
    "Score": ("evaluation.protocols", "evaluation.score", "evaluation.evaluate", "evaluation.results",
              "evaluation.compare", "evaluation.report"),
    "Errors": ("errors",),
}  # fmt: skip
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
ITEM = re.compile(r"^(\*{0,2}\w[\w, *]*): (.*)$")


def api(package: Path = PACKAGE) -> str:
    """The page as Markdown."""
    parts = [
        "# API reference\n",
        "Generated from the docstrings. Names that are not listed here are internal.\n",
    ]
    for title, names in MODULES.items():
        parts.append(f"## {title}\n")
        for name in names:
            file = package / f"{name.replace('.', '/')}.py"
            parts += _module(name, ast.parse(file.read_text(encoding="utf-8")))
    return "\n".join(parts)


def _module(name: str, tree: ast.Module) -> list[str]:
    paragraphs = (ast.get_docstring(tree) or "").split("\n\n")
    text = "\n\n".join(f"```python\n{part}\n```" if part.startswith("from ") else part for part in paragraphs)
    lines = [f"### cmmasksd.{name}\n", _text(text)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            lines += _entry(node)
    return lines


def _entry(node: ast.ClassDef | ast.FunctionDef, owner: str = "") -> list[str]:
    docstring = ast.get_docstring(node)
    if docstring is None:
        return []
    kind = "class" if isinstance(node, ast.ClassDef) else "def"
    names = {decorator.id for decorator in node.decorator_list if isinstance(decorator, ast.Name)}
    head = f"{owner}{node.name}{'' if 'property' in names else _signature(node)}"
    lines = [f"#### {owner}{node.name}\n", f"```text\n{kind} {head}\n```\n", _text(docstring)]
    if isinstance(node, ast.ClassDef):
        if fields := _fields(node):
            lines += ["**Attributes**\n", *fields, ""]
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
                lines += _entry(part, f"{node.name}.")
    return lines


def _fields(node: ast.ClassDef) -> list[str]:
    """Fields whose note is the docstring below them, as items of a list."""
    return [
        f"- `{field.target.id}`: {' '.join(note.value.value.split())}"
        for field, note in itertools.pairwise(node.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(note, ast.Expr)
        and isinstance(note.value, ast.Constant)
        and isinstance(note.value.value, str)
    ]


def _signature(node: ast.ClassDef | ast.FunctionDef) -> str:
    function = node
    if isinstance(node, ast.ClassDef):
        inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        if not inits:
            return ""
        function = inits[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = re.sub(r"^(self|cls)(, |$)", "", ast.unparse(function.args))
    back = f" -> {ast.unparse(function.returns)}" if function.returns and function is node else ""
    return f"({arguments}){back}"


def _text(docstring: str | None) -> str:
    """A docstring as Markdown: sections become lists, indented text becomes a block."""
    lines, out, items = inspect.cleandoc(docstring or "").splitlines(), [], False
    for line in lines:
        if SECTION.match(line):
            items = True
            out += ["", f"**{line.rstrip(':')}**", ""]
        elif items and line.startswith("    ") and not line.startswith("     "):
            match = ITEM.match(line[4:])
            out.append(f"- `{match[1]}`: {match[2]}" if match else f"- {line[4:]}")
        elif items and line.startswith("     "):
            out.append(f"  {line.strip()}")
        else:
            items = items and not line
            out.append(line)
    return "\n".join(out).strip() + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("api.md")
    target.write_text(api(), encoding="utf-8")
