"""OpenAI's CLIP with a ViT or a ResNet, written from its paper and its checkpoints' names, to compare ours with."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
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


class Bottleneck(nn.Module):
    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width * 4, 1, bias=False), nn.BatchNorm2d(width * 4)
        self.avgpool = nn.AvgPool2d(stride)
        self.downsample = nn.Sequential()
        if stride > 1 or into != width * 4:
            self.downsample.add_module("-1", nn.AvgPool2d(stride))
            self.downsample.add_module("0", nn.Conv2d(into, width * 4, 1, bias=False))
            self.downsample.add_module("1", nn.BatchNorm2d(width * 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.avgpool(self.bn2(self.conv2(y)).relu())
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class AttentionPool(nn.Module):
    def __init__(self, side: int, width: int, heads: int, joint: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(side**2 + 1, width))
        self.k_proj, self.q_proj, self.v_proj = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.c_proj = nn.Linear(width, joint)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).permute(2, 0, 1)  # positions first
        x = torch.cat([x.mean(0, keepdim=True), x]) + self.positional_embedding[:, None]
        bias = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        weights = {f"{name}_proj_weight": getattr(self, f"{name}_proj").weight for name in "qkv"}
        pooled, _ = F.multi_head_attention_forward(
            x[:1], x, x, x.shape[-1], self.heads, None, bias, None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, training=False, need_weights=False,
            use_separate_proj_weight=True, **weights,
        )  # fmt: skip
        return pooled[0]


class ModifiedResNet(nn.Module):
    def __init__(self, size: int, depths: tuple[int, ...], width: int, joint: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1, self.bn1 = nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = nn.Conv2d(half, half, 3, padding=1, bias=False), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = nn.Conv2d(half, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        into = width
        for stage, depth in enumerate(depths):
            planes, blocks = width * 2**stage, []
            for block in range(depth):
                blocks.append(Bottleneck(into, planes, 2 if stage and not block else 1))
                into = planes * 4
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(size // 32, into, into // 64, joint)

    def stages(self, image: Tensor) -> list[Tensor]:
        """The features at strides 4, 8, 16 and 32."""
        x = self.bn1(self.conv1(image)).relu()
        x = self.bn2(self.conv2(x)).relu()
        x = self.avgpool(self.bn3(self.conv3(x)).relu())
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features

    def forward(self, image: Tensor) -> Tensor:
        return self.attnpool(self.stages(image)[-1])


class OpenAIClip(nn.Module):
    """The network with random weights, norms, statistics and biases too. Image tower: 128 wide, 3 layers, 32 pixels in
    patches of 8, or a ResNet with 4 channels at first and 128 at last, for 96 pixels; text tower: 64 wide, 2 layers;
    joint space 48."""

    def __init__(self, vocabulary: int, context: int, quick_gelu: bool, resnet: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = 96 if resnet else 32
        vit = not resnet
        self.visual = Visual(32, 8, 128, 3, 48, quick_gelu) if vit else ModifiedResNet(96, (2, 1, 2, 3), 4, 48)
        mask = torch.full((context, context), float("-inf")).triu(1)
        self.transformer = Transformer(64, 2, quick_gelu, mask)
        self.token_embedding = nn.Embedding(vocabulary, 64)
        self.positional_embedding = nn.Parameter(torch.randn(context, 64))
        self.ln_final = nn.LayerNorm(64)
        self.text_projection = nn.Parameter(torch.randn(64, 48))
        self.logit_scale = nn.Parameter(torch.tensor(2.5))
        for name, value in {"input_resolution": self.size, "context_length": context, "vocab_size": vocabulary}.items():
            self.register_buffer(name, torch.tensor(value))
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 1 and "embedding" not in name:  # of norms, and biases
                    parameter.copy_(0.2 * torch.randn_like(parameter) + name.endswith("weight"))
                elif resnet and parameter.ndim == 4:
                    parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            for name, buffer in self.named_buffers():
                if "running" in name:
                    buffer.copy_(0.3 * torch.randn_like(buffer) if "mean" in name else 0.5 + torch.rand_like(buffer))
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
        torch.jit.trace(self, (torch.zeros(1, 3, self.size, self.size), torch.ones(1, context, dtype=torch.long))).save(
            file
        )
