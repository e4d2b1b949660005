"""SigLIP's towers: held to transformers' own to 1e-5, and to what dropping, hiding and padding promise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import SiglipModel

from cmmasksd.errors import UserError
from cmmasksd.model.modeling import CMMaskSDModel
from cmmasksd.model.processing import CMMaskSDProcessor
from cmmasksd.model.tokenizing import load_tokenizer, tokenize
from cmmasksd.model.towers.families import FAMILIES
from cmmasksd.model.towers.siglip import SiglipImageTower, SiglipTextTower
from conftest import TINY_CONTEXT, TINY_SIZES, make_siglip, make_siglip_tokenizer

SIZES = [(32, 32), (64, 16), (40, 24), (72, 48), (8, 8)]
SENTENCES = ["the red square", "A blue Circle left of zebra 7", "right"]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def pixels(batch, height, width):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=[1, 2])
def tokenizer(request, tmp_path_factory):
    """As it comes back from its files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make_siglip_tokenizer(request.param).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def siglip(tokenizer) -> SiglipModel:
    siglip = make_siglip(len(tokenizer))
    siglip.text_model.config.pad_token_id = tokenizer.pad_token_id
    return siglip


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("size", SIZES)
def test_image_embedding_equals_transformers(siglip, size):
    image = pixels(2, *size)
    features, embedding = SiglipImageTower(siglip)(image)
    close(embedding, siglip.get_image_features(image, interpolate_pos_encoding=True).pooler_output)
    assert features.grid == (size[0] // 8, size[1] // 8)
    assert features.patches.shape == (2, features.grid[0] * features.grid[1], 48)
    assert features.pixels.shape == (*features.patches.shape[:2], 192)


def test_the_only_patch_is_the_image(siglip):
    features, embedding = SiglipImageTower(siglip)(pixels(2, 8, 8))
    close(features.patches[:, 0], embedding)


def test_dropped_patches_have_no_influence(siglip):
    image, tower = pixels(1, 32, 32), SiglipImageTower(siglip)
    keep = torch.tensor([[3, 0, 14, 7]])
    other = image.clone()
    other[..., 16:24, 8:24] += 3.0  # patches 9 and 10
    before, after = (tower(x, keep=keep, value_path=True)[0] for x in (image, other))
    for one, two in zip(
        (before.patches, before.dense, before.pixels), (after.patches, after.dense, after.pixels), strict=True
    ):
        assert torch.equal(one, two)
    assert not torch.allclose(tower(image)[0].patches[:, 3], tower(other)[0].patches[:, 3])
    everything = torch.arange(16)[None]
    close(tower(image, keep=everything)[0].patches, tower(image)[0].patches)


def test_sentence_equals_transformers(siglip, tokenizer):
    features = SiglipTextTower(siglip)(tokenize(tokenizer, SENTENCES))
    padded = tokenizer(SENTENCES, padding="max_length", max_length=TINY_CONTEXT, return_tensors="pt")["input_ids"]
    expected = siglip.text_model(padded)
    close(features.sentence, siglip.get_text_features(padded).pooler_output)
    length = features.words.shape[1]
    assert length < TINY_CONTEXT
    close(features.words, siglip.text_model.head(expected.last_hidden_state)[:, :length])
    close(features.embedded, siglip.text_model.embeddings.token_embedding(padded)[:, :length])


def test_a_sentence_does_not_depend_on_those_beside_it(siglip, tokenizer):
    tower = SiglipTextTower(siglip)
    together = tower(tokenize(tokenizer, SENTENCES))
    for nth, sentence in enumerate(SENTENCES):
        alone = tower(tokenize(tokenizer, [sentence]))
        close(together.sentence[nth], alone.sentence[0])
        close(together.words[nth][together.word_mask[nth]], alone.words[0][alone.word_mask[0]])


def test_a_hidden_word_leaves_nothing(siglip, tokenizer):
    tower = SiglipTextTower(siglip)
    first, second = (tokenize(tokenizer, [f"the {colour} square"]) for colour in ("red", "blue"))
    a, b = (tower(tokens.hide(tokens.word_ids == 1)) for tokens in (first, second))
    assert torch.equal(a.sentence, b.sentence)
    assert torch.equal(a.words, b.words)
    assert torch.equal(a.embedded, b.embedded)
    assert torch.equal(a.word_mask, (first.word_ids == 0) | (first.word_ids == 2))
    assert not torch.allclose(tower(first).sentence, tower(second).sentence)
    # it is the padding token in its place
    ids = first.input_ids.masked_fill(first.word_ids == 1, tokenizer.pad_token_id)
    padding = torch.full((1, TINY_CONTEXT - ids.shape[1]), tokenizer.pad_token_id)
    close(a.sentence, siglip.get_text_features(torch.cat([ids, padding], 1)).pooler_output)


def test_words_are_split_at_spaces(tokenizer):
    text = "  a Red zebra on\tthe left "
    tokens = tokenize(tokenizer, [text, "right"])
    assert [text[word.start : word.end] for word in tokens.words(0)] == text.split()
    assert len(tokens.words(0)[2].tokens) > 1  # in pieces
    assert tokens.word_ids[0].max() == 5
    assert tokens.word_ids[0, -1] == -1  # the end
    assert tokens.word_ids[1].max() == 0
    capital, small = tokenize(tokenizer, ["RED"]), tokenize(tokenizer, ["red"])
    assert torch.equal(capital.input_ids, small.input_ids)


def test_padding_comes_from_the_tokenizer_and_is_saved(tiny_siglip_folder: Path, tmp_path: Path):
    """config.json of SigLIP 2 says 1, its tokenizer 0."""
    model = CMMaskSDModel.from_backbone(tiny_siglip_folder, **TINY_SIZES)
    assert SiglipModel.from_pretrained(tiny_siglip_folder).config.text_config.pad_token_id == 1
    assert model.towers.text.text_model.config.pad_token_id == 0
    model.save_pretrained(tmp_path)
    assert CMMaskSDModel.from_pretrained(tmp_path).towers.text.text_model.config.pad_token_id == 0


def test_settings_of_a_new_processor(tiny_siglip_folder: Path):
    processor = CMMaskSDProcessor.from_backbone(
        tiny_siglip_folder, (32, 32), patch_size=8, resize="warp", max_tokens=99
    )
    assert (processor.mean, processor.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert processor.max_tokens == TINY_CONTEXT


def test_a_new_processor_lower_cases(tiny_siglip_folder: Path, tmp_path: Path):
    """tokenizer.json of SigLIP 2 does not: transformers' class adds it."""
    folder = Path(shutil.copytree(tiny_siglip_folder, tmp_path / "siglip"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentences = ["the RED square", "the red square"]
    given = load_tokenizer(folder)(sentences)["input_ids"]
    assert given[0] != given[1]
    processor = CMMaskSDProcessor.from_backbone(folder, (32, 32), patch_size=8, resize="warp", max_tokens=24)
    processor.save_pretrained(tmp_path / "saved")
    for one in (processor.tokenizer, load_tokenizer(tmp_path / "saved")):
        assert one(sentences)["input_ids"] == [given[1]] * 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"vision_config": {"vision_use_head": False}}, "vision_use_head"),
        ({"text_config": {"projection_size": 7}}, "projection_size"),
        ({"text_config": {"pad_token_id": 1_000_000}}, "pad_token_id"),
        ({"text_config": {"hidden_size": 33}}, "text_config.hidden_size"),
        ({"vision_config": {"image_size": [32, 16]}}, "vision_config.image_size"),
        ({"vision_config": 5}, "vision_config"),
    ],
)
def test_unfit_sizes_are_refused(change, match):
    with pytest.raises(UserError, match=match):
        FAMILIES["siglip"].config(change)
