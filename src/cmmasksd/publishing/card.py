"""The model card: README.md of a published model, from its files and its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmmasksd.errors import UserError, reason, shown
from cmmasksd.model.locating import MODEL_TYPE, read_json, require

CARD = "README.md"


def model_card(folder: Path, name: str, results: Sequence[Mapping[str, Any]] = (), *, licence: str = "mit") -> str:
    """The README.md of a model, from its files and its scores.

    Args:
        folder: of the model.
        name: USER/NAME, or what the folder is called.
        results: as `cmmasksd.evaluation.results.read_results` gives them, one per scored split.
        licence: of the weights, by the hub's identifier.

    Raises:
        UserError: as `contents`.
    """
    import yaml

    check_folder(folder)
    settings = read_settings(folder)
    header: dict[str, Any] = {
        "license": licence,
        "library_name": "cmmasksd",
        "pipeline_tag": "image-segmentation",
        "tags": ["referring-image-segmentation", "clip", "cm-masksd"],
    }
    if results:
        header["model-index"] = [{"name": name.split("/")[-1], "results": [_index_entry(one) for one in results]}]
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    scenes = str(settings.get("data", {}).get("name", "")).startswith("scenes")
    parts = [
        f"---\n{front}---\n",
        f"# {name}\n",
        "Referring image segmentation: an image and a sentence in, the mask of what the sentence names out. Made with "
        "cmmasksd, a public implementation of [CM-MaskSD](https://arxiv.org/abs/2305.11481).\n",
        "## Use\n",
        "```python\nfrom cmmasksd import Segmenter  # pip install cmmasksd\n"
        f'segmenter = Segmenter.from_pretrained("{name}")\n'
        'mask = segmenter.segment("picture.jpg", "the red circle on the left")[0].mask  # (H, W) bool\n```\n',
        "## Scores\n",
        *_scores(results, scenes),
        "## Data\n",
        _data(settings),
        "## Configuration\n",
        *_configuration(folder, settings),
        "## Limits\n",
        *_limits(folder, scenes),
        "## Licence\n",
        f"The weights: {licence}. CM-MaskSD is the work of its authors; cmmasksd is independent of them.\n",
    ]
    return "\n".join(parts)


def _metrics(result: Mapping[str, Any]) -> list[str]:
    return ["oIoU", "mIoU", *sorted(key for key in result if key.startswith("P@"))]


def _index_entry(result: Mapping[str, Any]) -> dict[str, Any]:
    data, split = str(result.get("data", "unknown")), str(result["split"])
    return {
        "task": {"type": "image-segmentation", "name": "Referring image segmentation"},
        "dataset": {"name": f"{data} {split}", "type": data, "split": split, "args": dict(result["protocol"])},
        "metrics": [{"type": key, "name": key, "value": round(100 * result[key], 2)} for key in _metrics(result)],
    }


def _scores(results: Sequence[Mapping[str, Any]], scenes: bool) -> Iterable[str]:
    if not results:
        yield "None were given when this card was written.\n"
        return
    columns = _metrics(results[0])
    yield f"| data | split | expressions | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 3)}"
    for result in results:
        cells = [str(result.get("data", "?")), str(result["split"]), str(result["expressions"])]
        yield f"| {' | '.join([*cells, *(f'{100 * result[key]:.2f}' for key in columns)])} |"
    yield (
        "\nIn percent. oIoU is the sum of intersections over the sum of unions, mIoU the mean over sentences; papers "
        "print either as IoU."
    )
    for protocol in dict.fromkeys(tuple(result["protocol"].items()) for result in results):
        yield "Protocol: " + ", ".join(f"{key} `{value}`" for key, value in protocol) + "."
    if any(str(result.get("data", "")).startswith("scenes") for result in results) or scenes:
        yield "Scores on generated scenes compare with no published figure."
    yield ""


def _data(settings: Mapping[str, Any]) -> str:
    data = settings.get("data", {})
    if "name" not in data:
        return "The model's folder does not record it.\n"
    if str(data["name"]).startswith("scenes"):
        return (
            f"Generated scenes of coloured shapes (style `{data['name']}`, {data.get('train_references')} references, "
            f"seed {data.get('scene_seed')}); the best checkpoint was chosen on their `{data.get('val_split')}`.\n"
        )
    name = "Pictures labelled by the author (`manifest`)" if data["name"] == "manifest" else f"`{data['name']}`"
    return (
        f"{name}, trained on `{data.get('train_split')}`; the best checkpoint was chosen on "
        f"`{data.get('val_split')}`. The images have their own terms of use.\n"
    )


def _configuration(folder: Path, settings: Mapping[str, Any]) -> Iterable[str]:
    from safetensors import safe_open

    from cmmasksd.model.configuration import read_config
    from cmmasksd.model.processing import CMMaskSDProcessor

    config, processor = read_config(folder), CMMaskSDProcessor.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118 (no mapping)
        kinds = sorted({one.get_dtype() for one in slices})
        count = sum(math.prod(one.get_shape()) for one in slices)
    height, width = processor.size
    yield "| | |\n|---|---|"
    yield f"| weights | {count / 1e6:.1f} M, {', '.join(kinds)} |"
    yield f"| input | {height}×{width} pixels (`{processor.resize}`), at most {processor.max_tokens} tokens |"
    joint = config.clip_config.projection_dim
    yield f"| CLIP | patches of {processor.patch_size} pixels, joint width {joint} |"
    yield f"| decoder | {config.decoder_layers} layers of width {config.decoder_width} |"
    if how := settings.get("distillation"):
        on = [name for key, name in (("vision", "LMVSD"), ("language", "VMLSD")) if how.get(key)]
        said = f"{' and '.join(on)}, loss `{how.get('loss')}`" if on else "none"
        yield f"| masked branches, while training | {said} |"
    yield "\nEvery setting is in `config.yaml`.\n" if settings else ""


def _limits(folder: Path, scenes: bool) -> Iterable[str]:
    if scenes:
        yield "- It knows generated scenes of coloured shapes and is of no use on photographs."
    yield "- A sentence that names nothing in the picture may still get a mask."
    yield "- A score is the mean probability inside the mask, not a calibrated confidence."
    longest = read_json(folder / "processor_config.json")["max_tokens"]
    yield f"- A sentence is cut after {longest} tokens. Words that its training did not have are guesses.\n"


def check_folder(folder: Path) -> None:
    require(folder)
    if (kind := read_json(folder / "config.json").get("model_type")) != MODEL_TYPE:
        raise UserError(f"{folder} is a {shown(kind)} model, not a {MODEL_TYPE!r}: give the folder of a trained model")


def read_settings(folder: Path) -> dict[str, Any]:
    """config.yaml, or nothing where there is none."""
    import yaml

    file = folder / "config.yaml"
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}): give a folder that training wrote") from None
    if not isinstance(read, dict) or not all(isinstance(read.get(key, {}), dict) for key in ("data", "distillation")):
        raise UserError(f"{file} holds no settings: give a folder that training wrote")
    return read
