"""The model to train and its processor, as configured."""

from __future__ import annotations

from cmmasksd.config import Config
from cmmasksd.errors import UserError
from cmmasksd.model.locating import is_checkpoint
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.trained import TrainedModel, load_trained
from cmmasksd.training.log import say


def build(config: Config) -> tuple[TrainedModel, CMMaskSDProcessor]:
    """The model to train and its processor: `config.model.weights`, or a new model on the configured backbone.

    Sets `size`, `resize` and `max_tokens` of `config.model` to what they resolve to where they are None.

    Raises:
        UserError: the backbone or the weights cannot be loaded, or the sizes do not fit.
    """
    settings = config.model
    if settings.weights is None:
        source, trained = settings.backbone, None
        model: TrainedModel = CMMaskSDModel.from_backbone(
            source,
            decoder_width=settings.decoder_width,
            decoder_layers=settings.decoder_layers,
            decoder_heads=settings.decoder_heads,
            decoder_mlp=settings.decoder_mlp,
            head_width=settings.head_width,
            dropout=settings.dropout,
        )
        if is_checkpoint(source):
            say(f"{source} is converted to transformers' format, with {model.config.backbone.text_config.hidden_act}")
        defaults = {"size": (128, 128), "resize": "warp", "max_tokens": 48}
    else:
        source = settings.weights
        model, trained = load_trained(source)
        defaults = {"size": trained.size, "resize": trained.resize, "max_tokens": trained.max_tokens}
    for name, default in defaults.items():
        given = getattr(settings, name)
        if given is None:
            setattr(settings, name, default)
        elif trained is not None and given != default:
            say(f"model.{name} is {given}, in place of {default}, which {source} was trained with")
    assert settings.size is not None
    assert settings.resize is not None
    assert settings.max_tokens is not None
    distillation = config.distillation
    if distillation.language and distillation.language_level == "feature" and "word_mask" not in model.decoder_inputs:
        raise UserError(
            f"distillation.language_level feature hides words from the decoder, and that of {source} reads the "
            "sentence alone: use input"
        )
    model.freeze_unused()
    if config.training.freeze_image:
        model.towers.image.requires_grad_(False)
    if config.training.freeze_text:
        model.towers.text.requires_grad_(False)
    patch_size, longest = model.config.encoder.patch_size, model.config.encoder.max_tokens
    if not 3 <= settings.max_tokens <= longest:
        raise UserError(f"model.max_tokens {settings.max_tokens} does not fit {source}: choose from 3 to {longest}")
    if trained is None:
        processor = CMMaskSDProcessor.from_backbone(
            source, settings.size, patch_size=patch_size, resize=settings.resize, max_tokens=settings.max_tokens
        )
    else:
        processor = CMMaskSDProcessor(
            trained.tokenizer,
            settings.size,
            patch_size=patch_size,
            resize=settings.resize,
            max_tokens=settings.max_tokens,
            mean=trained.mean,
            std=trained.std,
        )
    return model, processor
