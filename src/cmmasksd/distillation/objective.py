"""The training objective of CM-MaskSD: three branches (main, LMVSD, VMLSD) to named losses.

    L = L_seg(z, y) + w [lambda_v KD(z_v || sg(z)) + lambda_l KD(z_l || sg(z))]                         (docs/method.md)

z: logits of the main branch; z_v: those of LMVSD, which sees the image with patches masked by the language; z_l: those
of VMLSD, which sees the sentence with words masked by the vision; y: ground truth; sg: stop-gradient; w: ramp from 0 to
1. All three branches share their weights. The encoders run once and the three decodes are one batched call, so both
branches together cost about 1.3 plain steps.

Plug-in: the objective asks a model for `encode_image`, `encode_text` and `decode` only and imports nothing of our
network. The one parameter it adds, the mask token, is not part of the model: inference never sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from cmmasksd.config import DistillationConfig
from cmmasksd.distillation.losses import distillation_loss, presence_loss, segmentation_loss
from cmmasksd.distillation.masking import choose_patches, choose_words, masked_patches, patch_scores
from cmmasksd.errors import UserError
from cmmasksd.model.correlation import correlation, sentence_correlation
from cmmasksd.model.towers.base import ImageFeatures, TextFeatures, Tokens


class Distillable(Protocol):
    """What the objective needs from a model. Shapes as in `ImageFeatures` and `TextFeatures`."""

    def encode_image(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> ImageFeatures:
        """`keep` is given for vision_level "input" only, `value_path` for correlation "values" only."""
        ...

    def encode_text(self, tokens: Tokens) -> TextFeatures: ...

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Logits (B, h, w)."""
        ...


@dataclass
class Views:
    """What the branches see. B sentences, N patches, L tokens.

    Attributes:
        branches: branch ("main" and the masked ones) -> image features and text features of B pairs.
        correlation: (B, N, L); None without masked branches.
        hidden_patches: (B, N) bool; None without LMVSD.
        hidden_words: (B, L) bool; None without VMLSD.
    """

    branches: dict[str, tuple[ImageFeatures, TextFeatures]]
    correlation: Tensor | None = None
    hidden_patches: Tensor | None = None
    hidden_words: Tensor | None = None


class MaskedSelfDistillation(nn.Module):
    """A model and its training objective in one module (so that DDP and FSDP wrap the whole training step).

    Args:
        model: an nn.Module that offers `Distillable`.
        settings: the branches and their masks. With both branches off this is plain training.
        dim: D, width of the joint space, for the mask token.

    Raises:
        UserError: weight sharing is off and the model cannot copy its decoder (`copy_decoder`).
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
        """Trained weights that are not the model's: the mask token, and decoders that are not shared."""
        return {name: weight.cpu() for name, weight in self.state_dict().items() if not name.startswith("model.")}

    def sync_own_decoders(self) -> list[nn.Parameter]:
        """Copy the main decoder into the decoders that are not shared; return their parameters.

        Called when the branches begin. Until then nothing but weight decay has changed these decoders."""
        for decoder in self.own_decoders.values():
            decoder.load_state_dict(self.model.copy_decoder().state_dict())  # pyright: ignore
        return list(self.own_decoders.parameters())

    @property
    def branches(self) -> list[str]:
        """Names of the masked branches that are on."""
        if self.settings.joint:
            return ["joint"]
        return [name for name, on in (("lmvsd", self.settings.vision), ("vmlsd", self.settings.language)) if on]

    def choose_patches(self, image: ImageFeatures, text: TextFeatures, corr: Tensor) -> Tensor:
        """The patches that LMVSD hides for each sentence, (B, N) bool."""
        settings = self.settings
        if settings.vision_guide == "sentence":
            scores = sentence_correlation(image, text, settings.correlation)
        else:
            scores = patch_scores(corr, text.word_mask, settings.vision_guide)
        return choose_patches(scores, settings.vision_ratio, settings.vision_which)

    def choose_words(self, tokens: Tokens, corr: Tensor) -> Tensor:
        """The tokens of the words that VMLSD hides, (B, L) bool."""
        settings = self.settings
        return choose_words(
            corr,
            tokens.word_ids,
            settings.language_ratio,
            settings.language_which,
            hide_single_word=settings.hide_single_word,
        )

    def mask_patches(
        self, pixel_values: Tensor, image_index: Tensor, image: ImageFeatures, hidden: Tensor
    ) -> ImageFeatures:
        """LMVSD's view of the images: hidden patches become the mask token; the decoder adds their positions.

        Args:
            pixel_values: (M, 3, H, W).
            image_index: (B,) int64, the image of each sentence.
            image: B rows, unmasked.
            hidden: (B, N) bool.
        """
        level = self.settings.vision_level
        if level == "blank":
            size = pixel_values.shape[-1] // image.grid[1]
            blank = hidden.unflatten(1, image.grid).repeat_interleave(size, 1).repeat_interleave(size, 2)  # (B, H, W)
            seen = self._model.encode_image(pixel_values[image_index].masked_fill(blank[:, None], 0.0))
            return replace(image, patches=seen.patches, context=seen.context, pixels=seen.pixels)
        token, context = self.mask_token.to(image.patches.dtype), image.context
        if level == "feature":
            patches = torch.where(hidden[..., None], token, image.patches)
        else:
            visible = hidden.shape[1] - masked_patches(hidden.shape[1], self.settings.vision_ratio)
            keep = hidden.sort(dim=1, stable=True).indices[:, :visible]  # (B, n): visible patches come first
            seen = self._model.encode_image(pixel_values[image_index], keep=keep)
            patches = token.expand_as(image.patches).scatter(1, keep[..., None].expand_as(seen.patches), seen.patches)
            context = seen.context  # that of the first pass would give away what is dropped
        pixels = None if image.pixels is None else image.pixels.masked_fill(hidden[..., None], 0.0)
        return replace(image, patches=patches, context=context, pixels=pixels, hidden=hidden, whole=image.patches)

    def mask_words(self, tokens: Tokens, text: TextFeatures, hidden: Tensor) -> TextFeatures:
        """VMLSD's view of the sentences: words are hidden from the text tower on, or from the decoder only.

        Args:
            tokens: B sentences.
            text: their features, unmasked.
            hidden: (B, L) bool.
        """
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
            ground truth on the masked branches), and "presence". Scalars.
        """
        settings = self.settings
        distils = bool(self.branches) and ramp > 0
        logits = self.decode(self.views(pixel_values, tokens, image_index, masked=distils))
        main = logits["main"]  # z

        losses = {"seg": segmentation_loss(main, target, settings.segmentation)}  # L_seg(z, y)
        loss = losses["seg"]
        if settings.presence:
            losses["presence"] = presence_loss(main, target)
            loss = loss + settings.presence * losses["presence"]
        weights = {  # lambda_v, lambda_l
            "lmvsd": settings.vision_weight,
            "vmlsd": settings.language_weight,
            "joint": settings.vision_weight,
        }
        for branch in self.branches if distils else ():
            student = logits[branch]  # z_v or z_l
            losses[branch] = distillation_loss(student, main, settings.loss, settings.temperature)  # KD(z_v || sg(z))
            loss = loss + ramp * weights[branch] * losses[branch]
            if settings.ground_truth:
                losses[f"{branch}_seg"] = segmentation_loss(student, target, settings.segmentation)  # L_seg(z_v, y)
                loss = loss + ramp * settings.ground_truth * losses[f"{branch}_seg"]
        if self.branches and not distils:
            loss = self._with_zero_gradients(loss)
        return {"loss": loss, **losses}

    def _with_zero_gradients(self, loss: Tensor) -> Tensor:
        """The same loss, with a gradient of zero for the parameters of the masked branches, which do not run yet.

        DistributedDataParallel waits for a gradient of every parameter.
        """
        waiting = [parameter for name, parameter in self.named_parameters() if not name.startswith("model.")]
        return loss + 0.0 * torch.stack([parameter.sum() for parameter in waiting]).sum() if waiting else loss

    def views(
        self, pixel_values: Tensor, tokens: Tokens, image_index: Tensor | None = None, *, masked: bool = True
    ) -> Views:
        """What each branch sees; the encoders run once. Arguments as in `forward`.

        Args:
            masked: include the views of the masked branches.
        """
        settings, model = self.settings, self._model
        if image_index is None:
            image_index = torch.arange(len(tokens), device=pixel_values.device)
        wants_values = masked and settings.correlation == "values"
        image = model.encode_image(pixel_values, value_path=True) if wants_values else model.encode_image(pixel_values)
        image = image.select(image_index)
        text = model.encode_text(tokens)
        views = Views({"main": (image, text)})
        if not masked:
            return views
        views.correlation = correlation(image, text, settings.correlation)
        masked_image, masked_text = image, text
        if settings.vision:
            views.hidden_patches = self.choose_patches(image, text, views.correlation)
            masked_image = self.mask_patches(pixel_values, image_index, image, views.hidden_patches)
        if settings.language:
            views.hidden_words = self.choose_words(tokens, views.correlation)
            masked_text = self.mask_words(tokens, text, views.hidden_words)
        branches = {
            "lmvsd": (masked_image, text),
            "vmlsd": (image, masked_text),
            "joint": (masked_image, masked_text),
        }
        views.branches |= {branch: branches[branch] for branch in self.branches}
        return views

    def decode(self, views: Views) -> dict[str, Tensor]:
        """Logits of every branch, (B, h, w), in one batched call; decoders that are not shared take one call each."""
        branches = views.branches
        if self.own_decoders:
            decoders = dict.fromkeys(branches, self._model.decode) | dict(self.own_decoders.items())
            return {branch: decoders[branch](*view) for branch, view in branches.items()}
        images, texts = zip(*branches.values(), strict=True)
        logits = self._model.decode(ImageFeatures.cat(images), TextFeatures.cat(texts))
        return dict(zip(branches, logits.chunk(len(branches)), strict=True))
