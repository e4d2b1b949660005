"""CMMaskSDModel: CLIP's towers, the fusion decoder and the mask head. The forward pass is one screen.

Encode once, decode per expression: `encode_image` and `encode_text` are apart, so K expressions on one image cost one
image encoding. The masked branches of CM-MaskSD are not here: they exist only while training (see
`cmmasksd.distillation`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, CLIPModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from cmmasksd.errors import UserError, reason, shown
from cmmasksd.model import clip as towers
from cmmasksd.model.clip import ImageFeatures, TextFeatures, Tokens
from cmmasksd.model.configuration import CMMaskSDConfig, read_clip_config, read_config
from cmmasksd.model.decoder import Attention, FusionDecoder
from cmmasksd.model.hub import contents, files_of, model_card, model_folder, read_json, require, upload
from cmmasksd.model.mask_head import MaskHead

if TYPE_CHECKING:
    from cmmasksd.model.processing import CMMaskSDProcessor

WEIGHTS = "model.safetensors"


@dataclass
class CMMaskSDOutput(ModelOutput):
    """logits: (K, 4h, 4w) for K expressions and a patch grid of h x w."""

    logits: Tensor | None = None


class Decoder(nn.Module):
    """Fusion decoder and mask head: all of the network that is not CLIP."""

    def __init__(self, fusion: FusionDecoder, head: MaskHead) -> None:
        super().__init__()
        self.fusion, self.head = fusion, head

    def forward(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Features of K images and K sentences to logits (K, 4h, 4w)."""
        assert text.embedded is not None  # `encode_text` and `encode_image` give them
        assert image.pixels is not None
        fused = self.fusion(
            image.patches,
            text.words,
            text.embedded,
            text.sentence,
            text.word_mask,
            image.grid,
            hidden=image.hidden,
            whole=image.whole,
        )
        return self.head(fused, image.pixels, text.sentence, image.grid)


class CMMaskSDModel(PreTrainedModel):
    """Referring image segmentation on CLIP.

    Args:
        config: sizes; the weights are fresh. See `from_backbone` and `from_pretrained` for trained ones.
    """

    config_class = CMMaskSDConfig
    base_model_prefix = "cmmasksd"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    config: CMMaskSDConfig

    def __init__(self, config: CMMaskSDConfig) -> None:
        super().__init__(config)
        dim = config.clip_config.projection_dim
        self.clip = CLIPModel._from_config(config.clip_config)
        self.decoder = Decoder(
            FusionDecoder(
                dim,
                config.clip_config.text_config.hidden_size,
                width=config.decoder_width,
                layers=config.decoder_layers,
                heads=config.decoder_heads,
                mlp=config.decoder_mlp,
                dropout=config.dropout,
            ),
            MaskHead(dim, config.decoder_width, width=config.head_width),
        )
        self.post_init()
        self._begin()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            nn.init.ones_(module.weight)
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @torch.no_grad()
    def _begin(self) -> None:
        """What is more than one layer's matter (transformers calls `_init_weights` for single layers only)."""
        kernel, fusion = self.decoder.head.kernel, self.decoder.fusion
        # one kernel for all sentences, and masks that are rare
        nn.init.normal_(kernel.weight, std=0.1 * kernel.in_features**-0.5)
        nn.init.normal_(kernel.bias)
        nn.init.constant_(kernel.bias[-1:], -2.0)
        # patches and words lie in one space: attention begins as their similarity
        fusion.word_in.weight.copy_(fusion.patch_in.weight)
        fusion.sentence_in.weight.copy_(fusion.patch_in.weight)
        for module in fusion.modules():
            if isinstance(module, Attention):
                module.key_value.weight[: module.query.out_features].copy_(module.query.weight)

    # -- the forward pass

    @property
    def stride(self) -> float:
        """Pixels of the input per logit."""
        return self.config.clip_config.vision_config.patch_size / 4

    def encode_image(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> ImageFeatures:
        """(B, 3, H, W) normalised pixels to patches in the joint space. See `cmmasksd.model.clip.encode_image`."""
        return towers.encode_image(self.clip, pixel_values, keep=keep, value_path=value_path)[0]

    def encode_text(self, tokens: Tokens) -> TextFeatures:
        """Sentences to words and sentence in the joint space."""
        return towers.encode_text(self.clip, tokens)

    def decode(self, image: ImageFeatures, text: TextFeatures) -> Tensor:
        """Features of K images and K sentences (pair by pair) to logits (K, 4h, 4w). `ImageFeatures.select` repeats
        one image for its sentences."""
        return self.decoder(image, text)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        word_ids: Tensor,
        image_index: Tensor | None = None,
    ) -> CMMaskSDOutput:
        """Segment.

        Args:
            pixel_values: (B, 3, H, W), H and W multiples of the patch size.
            input_ids, attention_mask, word_ids: (K, L), see `Tokens`.
            image_index: (K,) int64, the image of each sentence. None: sentence k goes with image k, or all with the
                only one.

        Returns:
            logits (K, H / stride, W / stride).
        """
        tokens = Tokens(input_ids, attention_mask, word_ids, torch.zeros_like(input_ids[:, 0], dtype=torch.bool))
        image = self.encode_image(pixel_values)
        if image_index is None and len(image) == 1:
            image_index = input_ids.new_zeros(len(tokens))
        if image_index is not None:
            image = image.select(image_index)
        return CMMaskSDOutput(logits=self.decode(image, self.encode_text(tokens)))

    # -- weights

    def copy_decoder(self) -> nn.Module:
        """An independent decoder with the same weights, called like `decode`: distillation with separate weights."""
        return copy.deepcopy(self.decoder)

    @classmethod
    def from_backbone(cls, name: str | Path, **sizes: Any) -> CMMaskSDModel:
        """A new model on a trained CLIP.

        Args:
            name: any CLIP in transformers' format: a folder, a hub id such as "openai/clip-vit-base-patch16", or
                "tiny".
            **sizes: fields of CMMaskSDConfig.

        Raises:
            UserError: when there is no CLIP, or its weights do not fit its configuration.
        """
        clip = load_clip(name)
        clip.config._name_or_path = ""  # else it is saved: a path of this machine
        model = cls(CMMaskSDConfig(clip_config=clip.config, **sizes))
        model.clip.load_state_dict(clip.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> CMMaskSDModel:  # pyright: ignore
        """As in transformers, but missing, unexpected, misshapen or non-finite weights stop the load (the masks would
        be wrong), and of the folder only config.json and model.safetensors are read."""
        kwargs.setdefault("dtype", torch.float32)
        hub = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        folder = model_folder(name, **{key: kwargs.pop(key) for key in hub if kwargs.get(key) is not None})
        require(folder, ("config.json", WEIGHTS))
        sizes = {key: kwargs.pop(key) for key in CMMaskSDConfig.__annotations__ if key in kwargs}
        config = kwargs.pop("config", None) or read_config(folder, **sizes)
        return _built(cls, super().from_pretrained, config, _read(folder / WEIGHTS), folder, *args, **kwargs)

    def push_to_hub(  # pyright: ignore (the processor must travel with the model)
        self,
        repo_id: str,
        processor: CMMaskSDProcessor,
        *,
        results: Sequence[Mapping[str, Any]] = (),
        licence: str = "mit",
        private: bool = False,
        token: str | bool | None = None,
    ) -> str:
        """Upload the model, its processor and a generated card; returns the address. `cmmasksd push` does it for a
        folder.

        Args:
            repo_id: USER/NAME.
            processor: the one it was trained with.
            results: of this model, as `read_results` gives them; they go into the card.
            licence: of the weights, by the hub's identifier.
            private: nobody else may see it.
            token: of the hub; None: the one that you are logged in with.

        Raises:
            UserError: when the hub refuses.
        """
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            processor.save_pretrained(folder)
            files = contents(Path(folder), model_card(Path(folder), repo_id, results, licence=licence))
            return upload(files, repo_id, private=private, token=token)


AutoModel.register(CMMaskSDConfig, CMMaskSDModel, exist_ok=True)  # see cmmasksd.model.auto


def load_clip(name: str | Path) -> CLIPModel:
    """Load a CLIP by folder or hub id into float32, every weight accounted for.

    Raises:
        UserError: when there is none, or weights are missing.
    """
    folder = files_of(name, ("config.json", "model*.safetensors", "model.safetensors.index.json"))
    if not (folder / WEIGHTS).is_file() and not (folder / f"{WEIGHTS}.index.json").is_file():
        folder = files_of(name, ("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json"))
    require(folder, ("config.json",), "choose a CLIP in transformers' format")
    config, weights = read_clip_config(folder), {}
    for file in _files_of_weights(folder):
        weights |= _read(file)
    return _built(CLIPModel, CLIPModel.from_pretrained, config, weights, folder, dtype=torch.float32)


def _files_of_weights(folder: Path) -> list[Path]:
    """The weights of a CLIP: one file, or those that an index names, which must lie beside it."""
    names = [name for kind in (WEIGHTS, "pytorch_model.bin") for name in (kind, f"{kind}.index.json")]
    name = next((name for name in names if (folder / name).is_file()), WEIGHTS)
    if not name.endswith(".json"):
        require(folder, (name,), "choose a CLIP in transformers' format")
        return [folder / name]
    index = read_json(folder / name).get("weight_map")
    shards: list[Any] = list(index.values()) if isinstance(index, dict) else [index]
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]  # the hub's cache
    for shard in shards:
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard, re.ASCII):
            raise UserError(f"{folder / name} names {shown(shard)}: expected files of weights in its own folder")
    shards = sorted(set(shards))
    require(folder, shards, "get the missing files too")
    for shard in shards:
        if (folder / shard).resolve().parent not in homes:
            raise UserError(f"{folder / shard} is a link out of its folder: copy the file to where the link is")
    return [folder / shard for shard in shards]


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights. Pickled code is never run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"the pickled weights in {file} hold more than tensors: get them in safetensors format"
        ) from error
    except Exception as error:  # what the two libraries raise for a damaged file has no common class
        raise UserError(f"cannot load {file}: {reason(error)}") from error
    # a tensor that repeats its numbers (expanded) would need more memory than its file
    if not isinstance(found, dict) or not all(
        isinstance(one, Tensor) and one.numel() * one.element_size() <= one.untyped_storage().nbytes()
        for one in found.values()
    ):
        raise UserError(f"{file} holds more than plain tensors: get the weights in safetensors format")
    return found


def _built(
    kind: Any, load: Any, config: PreTrainedConfig, weights: dict[str, Tensor], folder: Path, *args: Any, **kwargs: Any
) -> Any:
    """A model of these weights; some that are missing, unexpected, misshapen or not finite stop it (else random ones
    would be evaluated). transformers gets no folder: it would read more from it than config.json and the weights."""
    stored = sum(value.numel() for value in weights.values())
    with torch.device("meta"):
        needed = sum(value.numel() for value in kind(config).parameters())
    if needed > 2 * stored:  # twice: where only some are missing, the names of these say more
        raise UserError(
            f"config.json in {folder} describes {needed} weights and the files hold {stored}: they belong to different "
            "models"
        )
    for key, value in weights.items():
        if not value.is_floating_point() and not key.endswith("position_ids"):
            raise UserError(f"weight {shown(key)} of {folder} is {value.dtype}: expected floating-point numbers")
        if not _is_finite(value):
            raise UserError(f"{shown(key)} in {folder} holds values that are not finite: train again, or get it again")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # its report of the weights is a table of hundreds of lines; ours is the error
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = load(None, *args, config=config, state_dict=weights, **kwargs)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot load a model from {folder}: {reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    gaps = {
        "of another shape": {key[0] for key in info["mismatched_keys"]},
        "missing": info["missing_keys"],
        # Old CLIP checkpoints also store the position indices, which are no weights.
        "unexpected": {key for key in info["unexpected_keys"] if not key.endswith("position_ids")},
    }
    for said, keys in gaps.items():
        if keys:
            few = ", ".join(shown(key) for key in sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
            raise UserError(
                f"{len(keys)} weights of {folder} are {said} ({few}): the file does not fit its config.json"
            )
    return model


def _is_finite(value: Tensor) -> bool:
    if not value.is_floating_point():
        return True
    # a sum is several times as quick as a look at every number, and overflows rarely
    return bool(value.sum(dtype=torch.float32).isfinite()) or bool(value.isfinite().all())
