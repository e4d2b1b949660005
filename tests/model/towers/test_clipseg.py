"""CLIPSeg: logits equal to transformers', an image encoded once, its own files, and refusals of spoilt ones."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers
from torch import Tensor

from cmmasksd.errors import UserError
from cmmasksd.evaluation.score import weights_digest
from cmmasksd.inference.predictor import Segmenter
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.towers.base import Tokens
from cmmasksd.model.towers.clipseg import CLIPSegForImageSegmentation, clipseg_config
from cmmasksd.model.trained import load_trained
from conftest import TINY_CONTEXT, make_clipseg

SENTENCES = ["the red square", "a blue circle on the left", "right"]
REAL = {  # of CIDAS/clipseg-rd64-refined
    "reduce_dim": 64,
    "extract_layers": [3, 6, 9],
    "use_complex_transposed_convolution": True,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 2048,
    "projection_dim": 512,
    "conditional_layer": 0,
}


@pytest.fixture
def folder(tiny_clipseg_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_clipseg_folder, tmp_path / "clipseg"))


def change(file: Path, **values: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (content | values).items() if value is not None}))


def theirs(network: transformers.CLIPSegForImageSegmentation, pixels: Tensor, tokens: Tokens) -> Tensor:
    """transformers encodes the image for every sentence."""
    pixels = pixels.expand(len(tokens), -1, -1, -1)
    with torch.no_grad():
        return network(
            input_ids=tokens.input_ids, pixel_values=pixels, attention_mask=tokens.attention_mask
        ).logits  # fmt: skip


def ours(model: CLIPSegForImageSegmentation, pixels: Tensor, tokens: Tokens) -> Tensor:
    with torch.no_grad():
        image = model.encode_image(pixels).select(torch.zeros(len(tokens), dtype=torch.long))
        return model.decode(image, model.encode_text(tokens))


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ({}, 32),
        ({}, 40),
        ({"use_complex_transposed_convolution": True}, 40),
        ({"extract_layers": [3, 1], "conditional_layer": 1}, 32),
        ({**REAL, "vision": {"patch_size": 16, "image_size": 224, "num_hidden_layers": 12}}, 352),
    ],
)
def test_logits_are_transformers(sizes: dict, side: int, folder: Path, tiny_tokenizer):
    network = make_clipseg(len(tiny_tokenizer), **sizes)
    network.save_pretrained(folder)
    change(folder / "preprocessor_config.json", size=side)
    model, processor = load_trained(folder)
    model.eval()
    tokens = processor.tokens(SENTENCES)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected, logits = theirs(network, pixels, tokens), ours(model, pixels, tokens)
    assert logits.shape == expected.shape == (3, round(side / model.stride), round(side / model.stride))
    assert expected[0].sub(expected[1]).abs().max() > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_weights_of_the_real_size_have_transformers_names_and_shapes():
    content = {"model_type": "clipseg", **REAL, "vision_config": {"patch_size": 16}, "text_config": {"eos_token_id": 2}}
    config = clipseg_config(content)
    with torch.device("meta"):
        model = CLIPSegForImageSegmentation(config)
        network = transformers.CLIPSegForImageSegmentation(
            transformers.CLIPSegConfig(**{key: value for key, value in content.items() if key != "model_type"})
        )
    shapes, expected = ({name: value.shape for name, value in each.state_dict().items()} for each in (model, network))
    assert shapes == expected
    assert model.stride == 1.0
    assert model.patch_width == 192
    assert config.encoder.max_tokens == 77


def test_an_image_that_is_not_square(folder: Path):
    """transformers takes the grid to be square."""
    model, processor = load_trained(folder)
    model.eval()
    logits = ours(model, torch.randn(1, 3, 32, 48), processor.tokens(SENTENCES))
    assert logits.shape == (3, 32, 48)
    assert logits.isfinite().all()


def test_the_processor_is_its_own(folder: Path):
    segmenter = Segmenter.from_pretrained(folder, device="cpu")
    processor = segmenter.processor
    assert (processor.size, processor.resize, processor.max_tokens) == ((40, 40), "warp", TINY_CONTEXT)
    assert (processor.mean, processor.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    change(folder / "preprocessor_config.json", size=48)
    assert CMMaskSDProcessor.from_pretrained(folder).size == (48, 48)


def test_a_processor_as_transformers_5_writes_it(folder: Path):
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    file = folder / "processor_config.json"
    file.write_text(json.dumps({"image_processor": settings, "processor_class": "CLIPSegProcessor"}))
    assert CMMaskSDProcessor.from_pretrained(folder).size == (40, 40)


def test_saved_it_is_a_clipseg_of_transformers_and_loads_again(folder: Path, tmp_path: Path):
    model, processor = load_trained(folder)
    model.save_pretrained(tmp_path / "saved")
    CMMaskSDProcessor(processor.tokenizer, (32, 48), patch_size=8, max_tokens=20).save_pretrained(tmp_path / "saved")
    network, info = transformers.CLIPSegForImageSegmentation.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values())
    again, saved = load_trained(tmp_path / "saved")
    assert (saved.size, saved.max_tokens) == ((32, 48), 20)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, network.state_dict()[name])
    assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == ["CLIPSegForImageSegmentation"]


def test_the_files_of_the_hub(folder: Path, tiny_tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A repository of 2022: pickled weights with position indices, vocab.json and merges.txt, 2 as the end token."""
    network = transformers.CLIPSegForImageSegmentation.from_pretrained(folder).eval()
    (folder / "model.safetensors").unlink()
    indices = {"clip.text_model.embeddings.position_ids": torch.arange(TINY_CONTEXT)[None]}
    torch.save(network.state_dict() | indices, folder / "pytorch_model.bin")
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_config=config["text_config"] | {"eos_token_id": 2, "bos_token_id": 0})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")

    commit = "c" * 40
    repository = tmp_path / "cache" / "models--someone--clipseg"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    segmenter = Segmenter.from_pretrained("someone/clipseg", device="cpu")
    tokens, pixels = segmenter.processor.tokens(SENTENCES), torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(
        ours(segmenter.model, pixels, tokens), theirs(network, pixels, tokens), rtol=1e-5, atol=1e-5
    )
    assert len(weights_digest(snapshot)) == 64


def test_hidden_patches_know_where_they_are(folder: Path):
    """CLIPSeg's decoder has no positions, so equal mask tokens would give equal logits."""
    model, processor = load_trained(folder)
    model.eval()
    image = model.encode_image(torch.randn(1, 3, 32, 32))
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, [0, 9]] = True
    masked = type(image)(image.patches.masked_fill(hidden[..., None], 0.0), image.grid, context=image.context)
    marked = type(image)(masked.patches, image.grid, context=image.context, hidden=hidden)
    text = model.encode_text(processor.tokens(SENTENCES[:1]))
    with torch.no_grad():
        cells = [model.decode(each, text).unfold(1, 8, 8).unfold(2, 8, 8) for each in (masked, marked)]
    torch.testing.assert_close(cells[0][0, 0, 0], cells[0][0, 2, 1], rtol=1e-5, atol=1e-5)
    assert (cells[1][0, 0, 0] - cells[1][0, 2, 1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"extract_layers": [4]}, "extract_layers is \\[4\\]: expected a list of blocks from 0 to 3"),
        ({"extract_layers": [-1]}, "extract_layers"),
        ({"extract_layers": []}, "extract_layers"),
        ({"extract_layers": "all"}, "extract_layers"),
        ({"extract_layers": [0] * 9}, "extract_layers"),
        ({"conditional_layer": 3}, "conditional_layer is 3: expected less than 3"),
        ({"reduce_dim": 15}, "reduce_dim 15 cannot be split among 2 heads"),
        ({"reduce_dim": 1 << 40}, "reduce_dim"),
        ({"use_complex_transposed_convolution": 1}, "use_complex_transposed_convolution is 1: expected true or false"),
        ({"vision_config": [1]}, "vision_config"),
        ({"projection_dim": 0}, "projection_dim"),
        ({"reduce_dim": 32}, r"weights of .* are of another shape"),
        ({"extract_layers": [0, 1]}, r"weights of .* are unexpected"),
    ],
)
def test_spoilt_sizes(values: dict, message: str, folder: Path):
    change(folder / "config.json", **values)
    with pytest.raises(UserError, match=message):
        load_trained(folder)


def test_small_patches_have_no_complex_convolution():
    with pytest.raises(UserError, match="patch_size is 2: expected at least 4"):
        clipseg_config({"use_complex_transposed_convolution": True, "vision_config": {"patch_size": 2}})


@pytest.mark.parametrize("size", [None, 41, "40", {"shortest_edge": 40}, {"height": 40}])
def test_spoilt_image_sizes(size: object, folder: Path):
    change(folder / "preprocessor_config.json", size=size)
    with pytest.raises(UserError, match=r"preprocessor_config\.json: .*(height|width|multiple)"):
        load_trained(folder)


def test_missing_files(folder: Path):
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"lacks preprocessor_config\.json"):
        load_trained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks model\.safetensors"):
        load_trained(folder)


def test_it_is_no_model_of_ours_and_no_backbone(folder: Path):
    with pytest.raises(UserError, match="is a 'clipseg' model, not a 'cmmasksd'"):
        CMMaskSDModel.from_pretrained(folder)
    with pytest.raises(UserError, match="is a 'clipseg' model, not CLIP"):
        CMMaskSDModel.from_backbone(folder)
