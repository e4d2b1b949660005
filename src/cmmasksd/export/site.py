"""A static site that runs a model in the visitor's browser: the page of `cmmasksd serve` with another backend.

    index.html, app.js, …    the page
    backend.js, tokenizer.js, pixels.js
                             OnnxSegmenter in JavaScript (browser/)
    model/                   an export, see export.py
    ort/                     onnxruntime-web, from the user's own `npm install`

Any file server works; it needs no special headers, since the page uses one thread.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cmmasksd.errors import UserError
from cmmasksd.export.export import check_target, export
from cmmasksd.inference.export_settings import EXPORT_FILE, ExportSettings
from cmmasksd.model.tokenizing import load_tokenizer

PAGE, BROWSER = Path(__file__).parents[1] / "serving/page", Path(__file__).parent / "browser"
ORT_VERSION = "1.30.0"
ORT_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_DIST_FOLDERS = (Path("node_modules/onnxruntime-web/dist"), Path("web/node_modules/onnxruntime-web/dist"))


def write_site(
    name: str | Path,
    out: Path,
    *,
    ort: Path | None = None,
    int8: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> ExportSettings:
    """Write the site.

    Args:
        name: folder of a trained model, hub id, or a model that ships.
        out: the folder; a site in it is replaced.
        ort: the folder `dist` of onnxruntime-web; None: that of node_modules in the working folder or in web/.
        int8, progress: see `export`.

    Returns:
        The content of `model/export.json`.

    Raises:
        UserError: as `export`, or onnxruntime-web is missing, or the page cannot read the tokenizer; nothing is
            written then.
    """
    ort = ort or next((folder for folder in _DIST_FOLDERS if folder.is_dir()), _DIST_FOLDERS[0])
    if missing := [file for file in ORT_FILES if not (ort / file).is_file()]:
        raise UserError(
            f"no {missing[0]} in {ort}: run `npm install onnxruntime-web@{ORT_VERSION}` here, or give its folder dist"
            " by --ort"
        )
    check_target(out, marker=Path("model") / EXPORT_FILE)
    tokenizer: Any = load_tokenizer(name)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if not (_is_clips(content) or _is_wordpiece(content)) or len(tokenizer("")["input_ids"]) != 2:  # start and end
        raise UserError(
            f"the tokenizer of {name} is neither CLIP's nor a lower-casing WordPiece, the only ones that the page reads"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parts:
        folder = Path(parts)
        settings = export(name, folder / "model", int8=int8, progress=progress)
        shutil.copytree(PAGE, folder, dirs_exist_ok=True)
        shutil.copytree(BROWSER, folder, dirs_exist_ok=True)  # its backend.js takes the place of the page's
        (folder / "ort").mkdir()
        for file in ORT_FILES:
            shutil.copyfile(ort / file, folder / "ort" / file)
        for file in sorted(folder.rglob("*")):
            target = out / file.relative_to(folder)
            if file.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    return settings


def _is_clips(tokenizer: dict) -> bool:
    """Whether tokenizer.js implements this tokenizer as CLIP's."""
    normalizers = (tokenizer.get("normalizer") or {}).get("normalizers", [])
    splitters = (tokenizer.get("pre_tokenizer") or {}).get("pretokenizers", [])
    model, post = tokenizer["model"], tokenizer.get("post_processor") or {}
    words = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    return (
        [step["type"] for step in normalizers] == ["NFC", "Replace", "Lowercase"]
        and (normalizers[1]["pattern"], normalizers[1]["content"]) == ({"Regex": r"\s+"}, " ")
        and [step["type"] for step in splitters] == ["Split", "ByteLevel"]
        and splitters[0] == {"type": "Split", "pattern": {"Regex": words}, "behavior": "Removed", "invert": True}
        and not splitters[1]["add_prefix_space"]
        and splitters[1]["use_regex"]
        and post.get("type") in ("RobertaProcessing", "TemplateProcessing")
        and (model["type"], model["end_of_word_suffix"]) == ("BPE", "</w>")
        and not any(
            model.get(key) for key in ("dropout", "continuing_subword_prefix", "byte_fallback", "ignore_merges")
        )
    )


def _is_wordpiece(tokenizer: dict) -> bool:
    """Whether tokenizer.js implements this tokenizer as BERT's."""
    normalizer, model = tokenizer["normalizer"] or {}, tokenizer["model"]
    return (
        normalizer.get("type") == "BertNormalizer"
        and all(normalizer[step] for step in ("clean_text", "handle_chinese_chars", "lowercase"))
        and normalizer["strip_accents"] is not False  # null: as `lowercase`
        and tokenizer["pre_tokenizer"] == {"type": "BertPreTokenizer"}
        and model["type"] == "WordPiece"
        and model["unk_token"] in model["vocab"]
        and all(token["special"] for token in tokenizer["added_tokens"])
    )
