"""The model card: README.md of a published model, made from card.md.jinja, the model's files and its scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmmasksd.errors import UserError, reason, shown
from cmmasksd.evaluation.protocols import METRIC_NAMES
from cmmasksd.evaluation.tables import percentages, protocol_lines
from cmmasksd.model.locating import MODEL_TYPE, read_json, require

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card.md.jinja")


def model_card(folder: Path, name: str, results: Sequence[Mapping[str, Any]] = (), *, licence: str = "mit") -> str:
    """Write the README.md of a model.

    Args:
        folder: folder of the model.
        name: USER/NAME on the hub, or the name of the published folder.
        results: one per scored split, as `cmmasksd.evaluation.results.read_results` gives them.
        licence: licence of the weights, by the hub's identifier.

    Returns:
        Markdown with the hub's metadata in front.

    Raises:
        UserError: the folder lacks a file that loading needs or holds another kind of model, or one split was scored
            by two protocols.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from cmmasksd.model.configuration import read_config
    from cmmasksd.model.processing import CMMaskSDProcessor
    from cmmasksd.model.towers.families import FAMILIES

    check_folder(folder)
    config = read_config(folder)
    settings = read_settings(folder)
    data = settings.get("data", {})
    scenes = str(data.get("name", "")).startswith("scenes")
    metadata = ModelCardData(
        license=licence,
        library_name="cmmasksd",
        pipeline_tag="image-segmentation",
        tags=["referring-image-segmentation", config.family, "cm-masksd"],
        model_name=name.split("/")[-1] if results else None,
        eval_results=list(_eval_results(results)) or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        name=name,
        metrics=METRIC_NAMES,
        rows=[[_data(result), result["split"], result["expressions"], *percentages(result)] for result in results],
        protocols=protocol_lines(results),
        on_scenes=scenes or any(_data(result).startswith("scenes") for result in results),
        data=data,
        scenes=scenes,
        config=config,
        backbone=FAMILIES[config.family].label,
        processor=CMMaskSDProcessor.from_pretrained(folder),
        weights=_weights(folder / "model.safetensors"),
        branches=_branches(settings.get("distillation", {})),
    )
    return f"{card}\n"


def _data(result: Mapping[str, Any]) -> str:
    return result.get("data", "unknown")


def _eval_results(results: Sequence[Mapping[str, Any]]) -> Iterator[EvalResult]:
    """The scores as the hub's metadata; the hub keeps one protocol (`dataset_args`) per split of a data set."""
    from huggingface_hub import EvalResult

    protocols: dict[tuple[str, str], Mapping[str, Any]] = {}
    for result in results:
        data, split, protocol = _data(result), result["split"], result["protocol"]
        if protocols.setdefault((data, split), protocol) != protocol:
            raise UserError(f"{data} {split} was scored by two protocols: give the results of one")
        for metric in METRIC_NAMES:
            yield EvalResult(
                task_type="image-segmentation",
                task_name="Referring image segmentation",
                dataset_type=data,
                dataset_name=f"{data} {split}",
                dataset_split=split,
                dataset_args=dict(protocol),
                metric_type=metric,
                metric_name=metric,
                metric_value=round(100 * result[metric], 2),
            )


def _weights(file: Path) -> str:
    """Number and types of the weights in a file, as text."""
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        slices = [weights.get_slice(key) for key in weights.keys()]  # noqa: SIM118 (no mapping)
        count = sum(math.prod(weight.get_shape()) for weight in slices)
        return f"{count / 1e6:.1f} M, {', '.join(sorted({weight.get_dtype() for weight in slices}))}"


def _branches(distillation: Mapping[str, Any]) -> str:
    """The masked branches that a training had, as text; empty where its settings are not recorded."""
    if not distillation:
        return ""
    names = [name for key, name in (("vision", "LMVSD"), ("language", "VMLSD")) if distillation.get(key)]
    return f"{' and '.join(names)}, loss `{distillation.get('loss')}`" if names else "none"


def check_folder(folder: Path) -> None:
    """Stop where a folder does not hold a whole model of ours.

    Raises:
        UserError: a file that loading needs is missing, or the model is of another kind.
    """
    require(folder)
    if (kind := read_json(folder / "config.json").get("model_type")) != MODEL_TYPE:
        raise UserError(
            f"{folder} holds a {shown(kind)} model, and cards describe {MODEL_TYPE!r} only: give such a folder, or "
            "upload this one with `hf upload`"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Read a model's config.yaml; empty where the folder has none.

    Raises:
        UserError: the file does not hold the settings of a training.
    """
    import yaml

    file = folder / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({reason(error)}): give a folder that training wrote") from None
    sections = ("data", "distillation")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in sections):
        raise UserError(f"{file} holds no settings: give a folder that training wrote")
    return settings
