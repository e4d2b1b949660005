"""Fixtures that every test may use: the folder of real data, and a tiny CLIP, model and processor with random weights.

Nothing here needs the network. The tiny CLIP has another width in each tower and in the joint space, so that a tensor
that skips a projection does not fit; and its weights are all random (norms and biases too), so that a skipped norm
shows.
"""

import copy
import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Set before transformers is imported: a test must never reach for the hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from playwright.sync_api import Browser
    from transformers import CLIPModel, CLIPTokenizer, PreTrainedModel, PreTrainedTokenizerFast, SiglipModel

    from cmmasksd.model.modeling import CMMaskSDModel
    from cmmasksd.model.processing import CMMaskSDProcessor
    from cmmasksd.model.towers.lite import LiteModel

TINY_SIZES = {"decoder_width": 32, "decoder_layers": 2, "decoder_heads": 2, "decoder_mlp": 48, "head_width": 32}
TINY_CONTEXT = 24
TINY_WORDS = ("the", "red", "blue", "square", "circle", "left", "right", "of", "a", "on")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors are slower on several threads, and the sums of one thread are the same on every machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of small real samples (refer-mini, refer-coco128); tests that need it skip where there is none."""
    folder = os.environ.get("CMMASKSD_REAL_DATA")
    if not folder:
        pytest.skip("CMMASKSD_REAL_DATA is not set: give it the folder that has refer-mini and refer-coco128")
    return Path(folder)


def make_tokenizer() -> "CLIPTokenizer":
    """CLIP's kind of tokenizer: each of TINY_WORDS is one piece, any other word falls into bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    pieces, merges = [*alphabet, *(byte + "</w>" for byte in alphabet)], []
    for word in TINY_WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            parts[:2] = ["".join(pair)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TINY_CONTEXT)


def make_clip(vocabulary: int, seed: int = 0, **text: int) -> "CLIPModel":
    """A CLIP of 32x32 pixels in patches of 8, with random weights that do not depend on transformers' own order."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision_config = tower | {"hidden_size": 48, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    text_config = tower | {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": TINY_CONTEXT}
    text_config |= {"vocab_size": vocabulary, "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1}
    text_config |= {"pad_token_id": vocabulary - 1} | text
    clip = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=40))
    return randomise(clip, seed)


def randomise(network: "PreTrainedModel", seed: int = 0) -> "PreTrainedModel":
    """Random weights for a CLIP or SigLIP, norms and biases too."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "layrnorm" in name:
                parameter.copy_(0.2 * noise + name.endswith("weight"))
            elif "embedding" in name:
                parameter.copy_(0.3 * noise)
            elif parameter.ndim == 2:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise)
    return network.eval()


def make_clipseg(vocabulary: int, seed: int = 0, vision: dict[str, int] | None = None, **sizes: Any) -> Any:
    """transformers' CLIPSeg of 32x32 pixels in patches of 8 with random weights."""
    import torch
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

    tower = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"hidden_size": 32, "max_position_embeddings": TINY_CONTEXT, "vocab_size": vocabulary}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1}
    image = {"hidden_size": 48, "image_size": 32, "patch_size": 8}
    decoder = {"extract_layers": [0, 1, 2], "reduce_dim": 16, "decoder_num_attention_heads": 2}
    torch.manual_seed(seed)
    config = CLIPSegConfig(
        text_config=tower | text,
        vision_config=tower | image | (vision or {}),
        **{"projection_dim": 40, "decoder_intermediate_size": 32, **decoder, **sizes},
    )
    return randomise(CLIPSegForImageSegmentation(config), seed)


def make_siglip(vocabulary: int, seed: int = 0) -> "SiglipModel":
    """A SigLIP of 32x32 pixels in patches of 8 with random weights. Its file names the wrong padding token, as SigLIP
    2's does."""
    from transformers import SiglipConfig, SiglipModel

    tower = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"hidden_size": 32, "projection_size": 48, "vocab_size": vocabulary, "max_position_embeddings": TINY_CONTEXT}
    vision = {"hidden_size": 48, "image_size": 32, "patch_size": 8}
    return randomise(SiglipModel(SiglipConfig(text_config=tower | text, vision_config=tower | vision)), seed)


def make_siglip_tokenizer(version: int = 2) -> "PreTrainedTokenizerFast":
    """Kinds of SigLIP's tokenizers: of SigLIP, pieces of a unigram model, split at spaces, where the end is also the
    padding; of SigLIP 2, byte-level BPE over the whole sentence. Each of TINY_WORDS is one piece."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Siglip2Tokenizer

    words = ["▁" + word for word in TINY_WORDS]
    letters = [*"0123456789abcdefghijklmnopqrstuvwxyz▁"]
    if version == 1:
        vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((w, -1.0) for w in words), *((c, -9.0) for c in letters)]
        backend = Tokenizer(models.Unigram(vocabulary, unk_id=0))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=TINY_CONTEXT, **special)
    pieces, merges = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{n:02X}>" for n in range(256)), *letters], []
    for word in words:
        parts = list(word)
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
                pieces.append("".join(pair))
            parts[:2] = ["".join(pair)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Siglip2Tokenizer(vocab=vocabulary, merges=merges, model_max_length=TINY_CONTEXT)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return tokenizer


def make_lite(vocabulary: int, seed: int = 0) -> "LiteModel":
    """An EfficientNet-Lite of one block a stage and its text tower, with random weights and statistics."""
    import torch

    from cmmasksd.model.towers.lite import LiteConfig, LiteModel

    sizes = {"width_factor": 0.25, "depth_factor": 0.1, "joint_width": 40, "vector_width": 12, "vocab_size": vocabulary}
    sizes |= {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    lite: Any = randomise(LiteModel(LiteConfig(**sizes, max_position_embeddings=TINY_CONTEXT)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(lite.named_parameters()):
            if parameter.ndim == 4:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
        for name, buffer in sorted(lite.named_buffers()):
            noise = torch.randn(buffer.shape, generator=generator)
            buffer.copy_(1 + 0.3 * noise.abs() if name.endswith("variance") else 0.3 * noise)
    return lite


def make_wordpiece_tokenizer(more: Iterable[str] = ()) -> "PreTrainedTokenizerFast":
    """BERT's kind of tokenizer, lower-casing: each of TINY_WORDS is one piece, any other word falls into letters and
    `more` pieces."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    pieces = dict.fromkeys([*special.values(), *TINY_WORDS, *letters, *("##" + letter for letter in letters), *more])
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=TINY_CONTEXT, **special)


@pytest.fixture(scope="session")
def tiny_lite_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny EfficientNet-Lite with its text tower and its tokenizer in transformers' format."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny-lite"), make_wordpiece_tokenizer()
    make_lite(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clipseg_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "CLIPTokenizer") -> Path:
    """A tiny CLIPSeg for images of 40x40 pixels, with its files in transformers' format."""
    folder = tmp_path_factory.mktemp("tiny-clipseg")
    make_clipseg(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    preprocessing = {"image_processor_type": "ViTImageProcessor", "size": {"height": 40, "width": 40}, "resample": 2}
    preprocessing |= {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))
    return folder


@pytest.fixture(scope="session")
def tiny_clip_resnet_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "CLIPTokenizer") -> Path:
    """A tiny CLIP with a ResNet and its tokenizer in transformers' format."""
    from cmmasksd.model.loading import build_backbone
    from cmmasksd.model.towers.families import FAMILIES
    from cmmasksd.model.towers.openai import to_transformers
    from model.towers.openai_clip import OpenAIClip

    folder = tmp_path_factory.mktemp("tiny-clip-resnet")
    clip = OpenAIClip(len(tiny_tokenizer), TINY_CONTEXT, quick_gelu=True, resnet=True)
    content, weights = to_transformers(clip.weights(), {}, quick_gelu=True)
    build_backbone(FAMILIES["clip_resnet"].config(content), weights, folder).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP 2 and its tokenizer in transformers' format."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny-siglip"), make_siglip_tokenizer()
    make_siglip(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> "CLIPTokenizer":
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: "CLIPTokenizer") -> Path:
    """A tiny CLIP and its tokenizer in transformers' format."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    make_clip(len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_model(tiny_clip_folder: Path) -> "CMMaskSDModel":
    import torch

    from cmmasksd.model.modeling import CMMaskSDModel

    model = CMMaskSDModel.from_backbone(tiny_clip_folder, **TINY_SIZES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms and biases away from one and zero, and independent of the order of initialisation
        for name, parameter in sorted(model.decoder.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture
def tiny_model(_tiny_model: "CMMaskSDModel") -> "CMMaskSDModel":
    """A CMMaskSDModel on the tiny CLIP, in eval mode; every test gets its own copy."""
    return copy.deepcopy(_tiny_model)


@pytest.fixture
def tiny_processor(tiny_tokenizer: "CLIPTokenizer") -> "CMMaskSDProcessor":
    """A processor for the tiny model: 32x32 pixels, warped."""
    from cmmasksd.model.processing import CMMaskSDProcessor

    return CMMaskSDProcessor(tiny_tokenizer, (32, 32), patch_size=8, max_tokens=TINY_CONTEXT)


@pytest.fixture(scope="session")
def tiny_model_folder(
    tmp_path_factory: pytest.TempPathFactory, _tiny_model: "CMMaskSDModel", tiny_tokenizer: "CLIPTokenizer"
) -> Path:
    """The tiny model and its processor, saved as training saves them. Copy it before you change anything in it."""
    from cmmasksd.model.processing import CMMaskSDProcessor

    folder = tmp_path_factory.mktemp("tiny-model")
    _tiny_model.save_pretrained(folder)
    CMMaskSDProcessor(tiny_tokenizer, (32, 32), patch_size=8, max_tokens=TINY_CONTEXT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that ships as ONNX, written by the command (which takes a minute). Copy it before you change it."""
    from cmmasksd.cli import main

    out = tmp_path_factory.mktemp("exported") / "scenes"
    assert main(["export", "--model", "scenes", "--out", str(out)]) == 0
    return out


ORT = Path(__file__).parents[1] / "web/node_modules/onnxruntime-web/dist"


def require_ort() -> None:
    """Skip a test of the static site where onnxruntime-web is missing."""
    if not ORT.is_dir():
        pytest.skip("onnxruntime-web is not installed, the site is NOT tested: npm install --prefix web")


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a plain file server, as `python -m http.server`."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join(60)
    server.server_close()


@pytest.fixture(scope="module")  # an open one stops the event loops of other modules
def browser() -> "Iterator[Browser]":
    """Headless Chromium (`CMMASKSD_CHROMIUM`, or `chromium` in the PATH)."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    path = os.environ.get("CMMASKSD_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("no Chromium: install Debian's chromium, or name another by CMMASKSD_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=180_000)
