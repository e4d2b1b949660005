"""What the masked branches see: for each sentence, its correlation with the image, what LMVSD and VMLSD mask, and what
each branch predicts from the rest. One figure per sentence.

Everything is drawn on the canvas that the network sees (warped or letterboxed), where the patches are. The masked
branches need more than the model: the mask token and the settings of the run, which training writes beside it
(`distillation.safetensors`, `config.yaml`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from cmmasksd.config import DistillationConfig
from cmmasksd.data.images import read_image
from cmmasksd.distillation.masking import patch_scores
from cmmasksd.distillation.objective import MaskedSelfDistillation
from cmmasksd.errors import UserError
from cmmasksd.inference.outputs import slug
from cmmasksd.inference.sources import refuse_url
from cmmasksd.inference.visualize import heat, overlay
from cmmasksd.model.locating import model_folder
from cmmasksd.model.placement import Placement
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.trained import TrainedModel, load_trained
from cmmasksd.training.checkpoint import WEIGHTS

SIDE = 256
"""Long side of a panel in pixels."""
HIDDEN = "___"
"""Replaces a word that VMLSD masks."""
BRANCHES = {"main": "prediction", "lmvsd": "without the patches", "joint": "without both"}
"""Branch -> caption; VMLSD's is the remaining sentence."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One sentence in one image. h x w patches; H x W pixels of the canvas.

    Attributes:
        text: the sentence.
        words: its words, and whether VMLSD masks each.
        image: (H, W, 3) uint8, the canvas.
        correlation: (h, w), cosine of each patch with its best-matching word.
        hidden_patches: (h, w) bool, the patches that LMVSD masks; None without LMVSD.
        probabilities: branch -> (H, W) in [0, 1].
    """

    text: str
    words: tuple[tuple[str, bool], ...]
    image: np.ndarray
    correlation: np.ndarray
    hidden_patches: np.ndarray | None
    probabilities: dict[str, np.ndarray]

    def figure(self, threshold: float = 0.5) -> Image.Image:
        """All panels in a row, each under its caption."""
        panels = [(f"“{self.text}”", self.image), ("correlation with the words", heat(self.image, self.correlation))]
        if self.hidden_patches is not None:
            panels.append(("LMVSD hides", _hide(self.image, self.hidden_patches)))
        remaining = " ".join(HIDDEN if hidden else word for word, hidden in self.words)
        for branch, probability in self.probabilities.items():
            caption = f"“{remaining}”" if branch == "vmlsd" else BRANCHES[branch]
            panels.append((caption, overlay(self.image, probability > threshold)))
        return _row(panels)


def load_objective(name: str | Path, model: TrainedModel) -> MaskedSelfDistillation:
    """The objective that a model was trained with, from the files that training wrote beside it.

    Args:
        name: folder of the model, hub id, or name of a shipped model.
        model: the model in it.

    Raises:
        UserError: the files are missing, damaged, or do not fit the model; or the run had no masked branches.
    """
    import yaml
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = model_folder(name)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"there is no {folder / 'config.yaml'}: give a folder that training wrote, such as runs/…/best")
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["distillation"]
        objective = MaskedSelfDistillation(model, DistillationConfig(**settings), model.patch_width)
        weights = load_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else {}
        missing = objective.load_state_dict(weights, strict=False)
    except (yaml.YAMLError, UnicodeDecodeError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the masked branches in {folder} cannot be read ({reason}): train again") from error
    misfits = [key for key in missing.missing_keys if not key.startswith("model.")] + missing.unexpected_keys
    if misfits:
        raise UserError(f"{folder / WEIGHTS} does not fit its config.yaml: {misfits}; train again")
    if not objective.branches:
        raise UserError(f"{folder} was trained without masked branches: there is nothing to explain")
    return objective.eval()


@torch.no_grad()
def explain(
    objective: MaskedSelfDistillation, processor: CMMaskSDProcessor, image: np.ndarray, texts: Sequence[str]
) -> list[Explanation]:
    """What the branches do with an image, for each sentence.

    Args:
        objective: see `load_objective`.
        processor: processor of the model.
        image: (H, W, 3) uint8 RGB.
        texts: sentences.
    """
    device = next(objective.parameters()).device
    canvas, placement = processor.image(image)
    tokens = processor.tokens(list(texts)).to(device)
    index = torch.zeros(len(texts), dtype=torch.long, device=device)
    views = objective.views(processor.pixel_values(canvas[None].to(device)), tokens, index)
    logits = objective.decode(views)
    assert views.correlation is not None
    main, text = views.branches["main"]
    scores = patch_scores(views.correlation, text.word_mask, "max").unflatten(1, main.grid)
    whole = Placement(placement.canvas, placement.canvas, (0, 0, *placement.canvas))
    probabilities = {name: processor.probabilities(z, whole).cpu().numpy() for name, z in logits.items()}
    hidden_words = views.hidden_words
    if hidden_words is None:
        hidden_words = torch.zeros_like(tokens.word_ids, dtype=torch.bool)
    hidden = views.hidden_patches
    explanations = []
    for nth, sentence in enumerate(texts):
        explanations.append(
            Explanation(
                sentence,
                tuple(
                    (sentence[word.start : word.end], bool(hidden_words[nth, word.tokens].any()))
                    for word in tokens.words(nth)
                ),
                canvas.permute(1, 2, 0).cpu().numpy(),
                scores[nth].cpu().numpy(),
                None if hidden is None else hidden[nth].unflatten(0, main.grid).cpu().numpy(),
                {name: maps[nth] for name, maps in probabilities.items()},
            )
        )
    return explanations


def write_figures(
    model: str | Path, image: Path, texts: Sequence[str], out: Path, *, seed: int = 0
) -> Iterator[tuple[str, Path]]:
    """Explain a trained model on an image file, and write a figure per sentence.

    Args:
        model: folder that training wrote, hub id, or name of a shipped model.
        image: image file.
        texts: sentences.
        out: folder for the figures; made if missing.
        seed: seed of masks that are drawn at random.

    Yields:
        Each sentence and the PNG file of its figure.

    Raises:
        UserError: the image cannot be read, or the model cannot be explained.
    """
    refuse_url(image)
    pixels = read_image(image, exif=True)
    network, processor = load_trained(model)
    objective = load_objective(model, network)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    for nth, explanation in enumerate(explain(objective, processor, pixels, texts), 1):
        file = out / f"{image.stem}_{nth}_{slug(explanation.text)}_explained.png"
        explanation.figure().save(file)
        yield explanation.text, file


def _hide(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) with hidden patches (h, w) painted grey."""
    rows, columns = (side // cells for side, cells in zip(image.shape[:2], patches.shape, strict=True))
    mask = patches.repeat(rows, 0).repeat(columns, 1)
    return np.where(mask[..., None], np.uint8(128), image)


def _row(panels: list[tuple[str, np.ndarray]]) -> Image.Image:
    """Panels side by side on white, each under its caption."""
    gap, line = 8, 22
    scale = SIDE / max(panels[0][1].shape[:2])
    height, width = (max(1, round(side * scale)) for side in panels[0][1].shape[:2])
    width = max(width, 120)
    font = ImageFont.load_default(13)
    page = Image.new("RGB", (len(panels) * (width + gap) + gap, height + line + 2 * gap), "white")
    draw = ImageDraw.Draw(page)
    for nth, (caption, pixels) in enumerate(panels):
        left = gap + nth * (width + gap)
        while draw.textlength(caption, font) > width and len(caption) > 2:
            caption = caption[:-2] + "…"
        draw.text((left, gap), caption, "black", font)
        page.paste(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST), (left, gap + line))
    return page
