"""EfficientNet-Lite and a small text tower, with the rows of an ImageNet classifier as their joint space.

Each row of the classifier is the direction of a class in the last grid of the network, and the text tower is trained to
send names there (`tools/photos_backbone.py`). There is no class token and no attention over the image: a patch is a
cell of stride 16, and its finer features (strides 4, 8 and 16) travel with its pixels, so that a patch hidden from the
decoder loses all of them.

A convolution mixes each patch with its surroundings. At stride 4, a visible patch carries something of pixels up to 9
away from its edge, at stride 8 up to 33, at stride 16 up to 169, and in the joint space up to 425 (Lite0); hidden
pixels further away have no influence. `keep` blanks the hidden pixels before the first convolution, which leaves
nothing of them.

A word is a fixed vector of a language model plus a learned one. In training, the learned one is dropped for half of
the tokens, so that the tower also understands words that its training lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cmmasksd.errors import UserError
from cmmasksd.model.decoder import Attention
from cmmasksd.model.initialisation import init_layer
from cmmasksd.model.towers.base import (
    DualEncoder,
    EncoderSizes,
    Family,
    ImageFeatures,
    ImageTower,
    TextFeatures,
    TextTower,
    Tokens,
    blank,
    cell_pixels,
    gather,
    per_patch,
)
from cmmasksd.model.towers.bounds import TEXT, TOKEN_ID, bounded, section
from cmmasksd.model.towers.efficientnet import STRIDE, EfficientNetLite, scales

MEAN_AND_STD = ((0.498, 0.498, 0.498), (0.502, 0.502, 0.502))
_BOUNDS = {key: TEXT[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
_BOUNDS |= {key: TEXT[key] for key in ("vocab_size", "max_position_embeddings")}
_BOUNDS |= {f"{name}_token_id": TOKEN_ID for name in ("bos", "eos", "pad")}
_BOUNDS |= {
    "width_factor": (0.1, 4.0),
    "depth_factor": (0.1, 8.0),
    "joint_width": (1, 16_384),
    "image_size": (16, 4096),
}
_BOUNDS |= {"vector_width": (1, 16_384), "learned_width": (1, 16_384), "word_dropout": (0.0, 1.0)}


class LiteConfig(PreTrainedConfig):
    """Sizes of a LiteModel.

    Args:
        width_factor, depth_factor, joint_width: see `EfficientNetLite`.
        image_size: side in pixels of the images that it was trained on.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes of the text tower.
        vocab_size: number of token ids.
        vector_width, learned_width: numbers of the fixed and of the learned vector of a token.
        word_dropout: fraction of the tokens that lose their learned vector in training.
        max_position_embeddings: longest sentence, start and end included.
        bos_token_id, eos_token_id, pad_token_id: [CLS], [SEP] and [PAD].
    """

    model_type = "lite"

    width_factor: float = 1.0
    depth_factor: float = 1.0
    joint_width: int = 1280
    image_size: int = 320
    hidden_size: int = 192
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    vocab_size: int = 15_004
    vector_width: int = 96
    learned_width: int = 32
    word_dropout: float = 0.5
    max_position_embeddings: int = 40
    bos_token_id: int = 2
    eos_token_id: int = 3
    pad_token_id: int = 0


class TextLayer(nn.Module):
    """Self-attention over tokens and an MLP; both pre-norm and residual."""

    def __init__(self, width: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(tokens)
        tokens = tokens + self.attention(x, x, mask)
        return tokens + self.mlp(self.norm2(tokens))


class TextNetwork(nn.Module):
    """Token ids to the joint space: the weights of the text tower."""

    vectors: Tensor

    def __init__(self, config: LiteConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.register_buffer("vectors", torch.zeros(config.vocab_size, config.vector_width))
        self.vector_in = nn.Linear(config.vector_width, width)
        self.word_embedding = nn.Embedding(config.vocab_size, config.learned_width)
        self.learned_in = nn.Linear(config.learned_width, width, bias=False)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, width)
        self.layers = nn.ModuleList(
            TextLayer(width, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.joint_width)
        self.word_dropout = config.word_dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) ids and mask to tokens in the joint space (B, L, D) and their input embeddings (B, L, width)."""
        learned = self.word_embedding(input_ids)
        if self.training:
            learned = learned * (torch.rand(learned.shape[:2], device=learned.device)[..., None] >= self.word_dropout)
        embedded = self.vector_in(self.vectors[input_ids]) + self.learned_in(learned)
        hidden, mask = embedded + self.position_embedding.weight[: input_ids.shape[1]], attention_mask.bool()
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.projection(self.norm(hidden)), embedded


class LiteModel(PreTrainedModel):
    """The weights of both towers, in transformers' format."""

    config_class = LiteConfig
    base_model_prefix = "lite"

    def __init__(self, config: LiteConfig) -> None:
        super().__init__(config)
        self.vision_model = EfficientNetLite(
            width_factor=config.width_factor, depth_factor=config.depth_factor, joint_width=config.joint_width
        )
        self.text_model = TextNetwork(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_layer(module)
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


class LiteImageTower(ImageTower):
    """EfficientNet-Lite, patch by patch."""

    def __init__(self, lite: LiteModel) -> None:
        super().__init__()
        self.network = lite.vision_model

    def forward(
        self, pixel_values: Tensor, *, keep: Tensor | None = None, value_path: bool = False
    ) -> tuple[ImageFeatures, Tensor]:
        """See `ImageTower`. The image embedding is the mean of the kept patches. `keep` blanks the pixels of the other
        patches to the mean colour. The patches are already dense features, so `value_path` returns them again."""
        grid = (pixel_values.shape[-2] // STRIDE, pixel_values.shape[-1] // STRIDE)
        pixel_values = blank(pixel_values, keep, grid)
        joint, finer = self.network(pixel_values)
        local = [per_patch(feature, 4 >> level) for level, feature in enumerate(finer)]
        pixels = torch.cat([cell_pixels(pixel_values, grid), *local], dim=-1)  # (B, N, 192 + 16 c4 + 4 c8 + c16)
        patches, pixels = gather(joint.flatten(2).mT, keep), gather(pixels, keep)
        return ImageFeatures(patches, grid, patches if value_path else None, pixels=pixels), patches.mean(1)


class LiteTextTower(TextTower):
    """A small transformer over fixed and learned vectors of words."""

    def __init__(self, lite: LiteModel) -> None:
        super().__init__()
        self.network = lite.text_model

    def forward(self, tokens: Tokens) -> TextFeatures:
        """See `TextTower`. The sentence is the output at [CLS], the first token."""
        words, embedded = self.network(tokens.input_ids, tokens.attention_mask)
        return TextFeatures(words, words[:, 0], tokens.word_ids >= 0, embedded)


def lite_config(content: object) -> LiteConfig:
    """A LiteConfig from the content of a config.json.

    Raises:
        UserError: a size is out of bounds, or sizes do not fit together.
    """
    config = LiteConfig(**bounded(section(content, "lite_config"), _BOUNDS))
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} cannot be split among {config.num_attention_heads} heads: expected a "
            "multiple"
        )
    return config


def dual_encoder(lite: LiteModel) -> DualEncoder:
    """The towers of a LiteModel, as views that share its modules."""
    return DualEncoder(LiteImageTower(lite), LiteTextTower(lite))


def encoder_sizes(config: LiteConfig) -> EncoderSizes:
    """What the rest of the package needs to know of a LiteModel's configuration."""
    return EncoderSizes(
        joint_width=config.joint_width,
        embedding_width=config.hidden_size,
        patch_size=STRIDE,
        image_size=config.image_size,
        max_tokens=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        start_token=config.bos_token_id,
        end_token=config.eos_token_id,
        scales=scales(config.width_factor),
    )


LITE = Family(
    "EfficientNet-Lite",
    LiteModel,
    lite_config,
    encoder_sizes,
    dual_encoder,
    unused=(),
    mean_and_std=MEAN_AND_STD,
)
