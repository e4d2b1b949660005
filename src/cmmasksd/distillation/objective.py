"""The training objective of CM-MaskSD: the main branch, LMVSD and VMLSD, to named losses.

    L = L_seg(z, y) + lambda_v KD(z_v || sg(z)) + lambda_l KD(z_l || sg(z))

z are the logits of the main branch; z_v those of LMVSD, which sees the image with patches masked by the language; z_l
those of VMLSD, which sees the sentence with words masked by the vision; sg stops the gradient. All three share their
weights. The encoders run once and the three decodes are one batched call, so both branches together cost about 1.3
plain steps.

Plug-in: the objective asks a model for `encode_image`, `encode_text` and `decode` only. It imports nothing of our
network. The one parameter it adds, the mask token, lives here and not in the model: inference never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.losses import distillation_loss, segmentation_loss
from cmmasksd.distillation.masking import choose_patches, choose_words, masked_patches, patch_scores
from cmmasksd.errors import UserError
from cmmasksd.model.correlation import correlation, sentence_correlation
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens


class Distillable(Protocol):
    """What the objective needs of a model. Shapes as in `ImageFeatures` and `TextFeatures`."""

    def encode_image(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> ImageFeatures:
        """`keep` is only given for vision_level "input", `value_path` for correlation "values"."""
        ...

    def encode_text(self, tokens: Tokens) -> TextFeatures: ...

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Logits (B, h, w)."""
        ...


@dataclass
class Views:
    """What the branches see. B sentences, N patches, L tokens.

    Attributes:
        branches: "main" and the masked ones -> image and text features, pair by pair.
        correlation: (B, N, L), where there are masked branches.
        hidden_patches: (B, N) bool, where LMVSD is on.
        hidden_words: (B, L) bool, where VMLSD is on.
    """

    branches: dict[str, tuple[ImageFeatures, TextFeatures]]
    correlation: Tensor | None = None
    hidden_patches: Tensor | None = None
    hidden_words: Tensor | None = None


class MaskedSelfDistillation(nn.Module):
    """A model and its training objective in one module (so that DDP and FSDP wrap the whole training step).

    Args:
        model: an nn.Module that offers `Distillable`.
        settings: which branches, and how. With both off this is plain training.
        dim: width of the joint space, for the mask token.

    Raises:
        UserError: when weight sharing is off and the model cannot copy its decoder (`copy_decoder`).
    """

    def __init__(self, model: nn.Module, settings: DistillationConfig, dim: int) -> None:
        super().__init__()
        self.model, self.settings = model, settings
        if settings.vision and settings.vision_level != "blank":
            self.mask_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.own_decoders = nn.ModuleDict()
        if not settings.share_weights:
            if not hasattr(model, "copy_decoder"):
                raise UserError("share_weights: false needs a model with copy_decoder(): share the weights instead")
            for branch in self.branches:
                self.own_decoders[branch] = model.copy_decoder()  # pyright: ignore

    def own_weights(self) -> dict[str, Tensor]:
        """What is trained here and is not the model's: the mask token, and decoders that are not shared."""
        return {k: v.detach().cpu() for k, v in self.state_dict().items() if not k.startswith("model.")}

    def sync_own_decoders(self) -> list[nn.Parameter]:
        """Copy the main decoder into the decoders that are not shared; returns their parameters.

        For the moment at which the branches begin: until then their decoders wait, and only weight decay has moved
        them."""
        for own in self.own_decoders.values():
            own.load_state_dict(self.model.copy_decoder().state_dict())  # pyright: ignore
        return list(self.own_decoders.parameters())

    @property
    def branches(self) -> list[str]:
        """Names of the masked branches that are on."""
        if self.settings.joint:
            return ["joint"]
        return [name for name, on in (("lmvsd", self.settings.vision), ("vmlsd", self.settings.language)) if on]

    def choose_patches(self, image: ImageFeatures, text: TextFeatures, corr: Tensor) -> Tensor:
        """The patches that LMVSD hides from each sentence, (B, N) bool."""
        how = self.settings
        if how.vision_guide == "sentence":
            scores = sentence_correlation(image, text, how.correlation)
        else:
            scores = patch_scores(corr, text.word_mask, how.vision_guide)
        return choose_patches(scores, how.vision_ratio, how.vision_which)

    def choose_words(self, tokens: Tokens, corr: Tensor) -> Tensor:
        """The tokens of the words that VMLSD hides, (B, L) bool."""
        how = self.settings
        return choose_words(
            corr, tokens.word_ids, how.language_ratio, how.language_which, hide_single_word=how.hide_single_word
        )

    def mask_patches(
        self, pixel_values: Tensor, image_index: Tensor, image: ImageFeatures, hidden: Tensor
    ) -> ImageFeatures:
        """LMVSD's view of the images: hidden patches become the mask token (their positions come from the decoder)."""
        how = self.settings
        if how.vision_level == "blank":
            size = pixel_values.shape[-1] // image.grid[1]
            painted = hidden.unflatten(1, image.grid).repeat_interleave(size, 1).repeat_interleave(size, 2)
            seen = self._model.encode_image(pixel_values[image_index].masked_fill(painted[:, None], 0.0))
            return replace(image, patches=seen.patches, context=seen.context, pixels=seen.pixels)
        if image.pixels is not None:
            image = replace(image, pixels=image.pixels.masked_fill(hidden[..., None], 0.0))
        whole = image.patches
        token = self.mask_token.to(image.patches.dtype)
        if how.vision_level == "feature":
            patches = torch.where(hidden[..., None], token, image.patches)
        else:
            visible = hidden.shape[1] - masked_patches(hidden.shape[1], how.vision_ratio)
            kept = hidden.sort(dim=1, stable=True).indices[:, :visible]  # visible patches come first
            seen = self._model.encode_image(pixel_values[image_index], keep=kept)
            index = kept[..., None].expand_as(seen.patches)
            image = replace(image, context=seen.context)  # the first pass's would give away what is dropped
            patches = token.expand_as(image.patches).scatter(1, index, seen.patches)
        return replace(image, patches=patches, hidden=hidden, whole=whole)

    def mask_words(self, tokens: Tokens, text: TextFeatures, hidden: Tensor) -> TextFeatures:
        """VMLSD's view of the sentences: the hidden words are gone, from the text tower on or for the decoder only."""
        if self.settings.language_level == "input":
            return self._model.encode_text(tokens.hide(hidden))
        return replace(text, word_mask=text.word_mask & ~hidden)

    @property
    def _model(self) -> Distillable:
        return self.model  # pyright: ignore (an nn.Module that offers the protocol)

    def forward(
        self,
        pixel_values: Tensor,
        tokens: Tokens,
        target: Tensor,
        image_index: Tensor | None = None,
        ramp: float = 1.0,
    ) -> dict[str, Tensor]:
        """One training step's losses.

        Args:
            pixel_values: (M, 3, H, W), the images of the batch, each once.
            tokens: B sentences.
            target: (B, h, w) in [0, 1] at the size of the logits.
            image_index: (B,) int64, the image of each sentence; None: sentence b goes with image b.
            ramp: factor of the distillation weights, 0 to 1 (warm-up). At 0 the masked branches do not run at all.

        Returns:
            "loss", and its parts before weighting: "seg", "lmvsd" and "vmlsd", or "joint" (and "lmvsd_seg", … with
            ground truth on the masked branches). Scalars.
        """
        how = self.settings
        distils = bool(self.branches) and ramp > 0
        logits = self.decode(self.views(pixel_values, tokens, image_index, masked=distils))

        main = logits["main"]
        losses = {"seg": segmentation_loss(main, target, how.segmentation)}
        loss = losses["seg"]
        weights = {"lmvsd": how.vision_weight, "vmlsd": how.language_weight, "joint": how.vision_weight}
        for branch in self.branches if distils else ():
            weight = weights[branch]
            losses[branch] = distillation_loss(logits[branch], main, how.loss, how.temperature)
            loss = loss + ramp * weight * losses[branch]
            if how.ground_truth:
                losses[branch + "_seg"] = segmentation_loss(logits[branch], target, how.segmentation)
                loss = loss + ramp * how.ground_truth * losses[branch + "_seg"]
        if self.branches and not distils:
            # Their own parameters wait, but data-parallel training wants a gradient for each, if a zero one.
            own = [p for name, p in self.named_parameters() if not name.startswith("model.")]
            loss = loss + 0.0 * torch.stack([p.sum() for p in own]).sum() if own else loss
        return {"loss": loss, **losses}

    def views(
        self, pixel_values: Tensor, tokens: Tokens, image_index: Tensor | None = None, *, masked: bool = True
    ) -> Views:
        """Encode once, and make what each branch sees. Arguments as in `forward`; without `masked`, the main branch's
        view alone."""
        how, model = self.settings, self._model
        if image_index is None:
            image_index = torch.arange(len(tokens), device=pixel_values.device)
        wants_values = masked and how.correlation == "values"
        image = model.encode_image(pixel_values, value_path=True) if wants_values else model.encode_image(pixel_values)
        image = image.select(image_index)
        text = model.encode_text(tokens)
        views = Views({"main": (image, text)})
        if not masked:
            return views
        views.correlation = correlation(image, text, how.correlation)
        seen, said = image, text
        if how.vision:
            views.hidden_patches = self.choose_patches(image, text, views.correlation)
            seen = self.mask_patches(pixel_values, image_index, image, views.hidden_patches)
        if how.language:
            views.hidden_words = self.choose_words(tokens, views.correlation)
            said = self.mask_words(tokens, text, views.hidden_words)
        branches = {"lmvsd": (seen, text), "vmlsd": (image, said), "joint": (seen, said)}
        views.branches |= {branch: branches[branch] for branch in self.branches}
        return views

    def decode(self, views: Views) -> dict[str, Tensor]:
        """Logits of every branch, (B, h, w), in one batched call; with own decoders, one call each."""
        branches = views.branches
        if self.own_decoders:
            return {
                name: self.own_decoders[name](*view) if name in self.own_decoders else self._model.decode(*view)
                for name, view in branches.items()
            }
        images, texts = zip(*branches.values(), strict=True)
        image = ImageFeatures(
            torch.cat([i.patches for i in images]),
            images[0].grid,
            context=_cat([i.context for i in images]),
            pixels=_cat([i.pixels for i in images]),
            **_hidden(images),
        )
        logits = self._model.decode(image, TextFeatures.cat(texts))
        return dict(zip(branches, logits.chunk(len(branches)), strict=True))


def _cat(parts: list[Tensor | None]) -> Tensor | None:
    """What a network's features do not have stays None."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None


def _hidden(images: Sequence[ImageFeatures]) -> dict[str, Tensor]:
    """`hidden` and `whole` of views that are decoded together; nothing where no view hides a patch."""
    masked = [i for i in images if i.hidden is not None]
    if not masked:
        return {}
    none = torch.zeros_like(masked[0].hidden)  # pyright: ignore (not None)
    return {
        "hidden": torch.cat([none if i.hidden is None else i.hidden for i in images]),
        "whole": torch.cat([i.patches if i.whole is None else i.whole for i in images]),
    }
