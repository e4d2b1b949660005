"""OpenAI's CLIP with a ViT, written from its paper and its checkpoints' names: what conversions are compared with."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, width: int, quick_gelu: bool, mask: Tensor | None) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, quick_gelu: bool, mask: Tensor | None = None) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, quick_gelu, mask) for _ in range(layers)))

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x.transpose(0, 1)).transpose(0, 1)  # positions first, as OpenAI's


class Visual(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, joint: int, quick_gelu: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, quick_gelu)
        self.proj = nn.Parameter(torch.randn(width, joint))

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv1(image).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj


class OpenAIClip(nn.Module):
    """The network with random weights, norms and biases too. Image tower: 128 wide, 3 layers, 32 pixels in patches of
    8; text tower: 64 wide, 2 layers; joint space 48."""

    def __init__(self, vocabulary: int, context: int, quick_gelu: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = Visual(32, 8, 128, 3, 48, quick_gelu)
        mask = torch.full((context, context), float("-inf")).triu(1)
        self.transformer = Transformer(64, 2, quick_gelu, mask)
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.positional_embedding = nn.Parameter(torch.randn(context, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, 48))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        for name, value in {"input_resolution": 32, "context_length": context, "vocab_size": vocabulary}.items():
            self.register_buffer(name, torch.tensor(value))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1 and "embedding" not in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter) + ("ln_" in name and name.endswith("weight")))
        self.eval()

    def encode_text(self, ids: Tensor) -> Tensor:
        """(B, context) ids, padded with 0."""
        x = self.ln_final(self.transformer(self.token_embedding(ids) + self.positional_embedding))
        return x[torch.arange(x.shape[0]), ids.argmax(dim=1)] @ self.text_projection

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual(image), self.encode_text(ids)

    def weights(self) -> Mapping[str, Tensor]:
        """What open_clip's checkpoints hold: without OpenAI's sizes."""
        sizes = ("input_resolution", "context_length", "vocab_size")
        return {name: value for name, value in self.state_dict().items() if name not in sizes}

    def save_archive(self, file: str) -> None:
        """A TorchScript archive, as OpenAI's."""
        context = self.positional_embedding.shape[0]
        torch.jit.trace(self, (torch.zeros(1, 3, 32, 32), torch.ones(1, context, dtype=torch.long))).save(file)
