"""Pretraining: a tokenizer that knows every byte, the two losses by hand, and a run that resumes where it stopped."""

import json
import math
import random

import pytest
import torch
import torch.nn.functional as F

from cmmasksd.config import PretrainConfig
from cmmasksd.data.scenes import COLOURS, HELD_OUT, SHAPES
from cmmasksd.errors import UserError
from cmmasksd.model.loading import load_clip
from cmmasksd.model.pixels import normalize
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.model.towers.clip import dual_encoder
from cmmasksd.pretraining import loop as module
from cmmasksd.pretraining.captions import CaptionedScenes, Collate, true_of
from cmmasksd.pretraining.loop import pretrain
from cmmasksd.pretraining.losses import SHARPNESS, changed_patches, contrastive_losses, lend_patches, region_similarity
from cmmasksd.pretraining.model import build_clip, train_tokenizer
from cmmasksd.pretraining.retrieval import retrieval


def micro(out="unused", **how):
    how = {"steps": 3, "save_every": 2, "batch_size": 4, "width": 32, "vision_layers": 1, "text_layers": 1} | how
    return PretrainConfig(
        out=out, phrases=2, image_size=64, patch_size=16, vocabulary=768, workers=0, bf16=False, warmup=2, **how
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(768, 64)


@pytest.fixture
def quick(monkeypatch, tokenizer):
    """Leave out what takes long and is tested by itself."""
    monkeypatch.setattr(module, "train_tokenizer", lambda *args: tokenizer)
    monkeypatch.setattr(module, "retrieval", lambda clip, tokenizer: {"R@1": 0.0} if clip.eval() else {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# -- the tokenizer


@pytest.mark.parametrize("text", ["the red square", "été — ß", "红色的圆", "a 🦊 and 👩‍🚀", "\x07 odd", "naïve café!?"])
def test_no_sentence_is_unknown(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.eos_token_id not in ids[1:-1]
    decoded = tokenizer.decode(ids[1:-1]).strip()
    assert decoded.replace(" ", "") == text.lower().strip().replace(" ", "")


def test_tokenizer_knows_the_scenes_words_whole(tokenizer):
    assert len(tokenizer) <= 768
    assert tokenizer.model_max_length == 64
    for word in (*COLOURS, *SHAPES):
        assert len(tokenizer(word)["input_ids"]) == 3, word


def test_the_shipped_tokenizer_has_no_unknown_byte():
    shipped = load_tokenizer("tiny")
    ids = shipped("日本 🦊 zebra")["input_ids"]
    assert shipped.eos_token_id not in ids[1:-1]
    assert shipped.decode(ids[1:-1]).strip() == "日本 🦊 zebra"


def test_a_vocabulary_without_room_for_every_byte_is_refused():
    with pytest.raises(UserError, match=r"vocabulary of 513 .*: use at least 514"):
        train_tokenizer(513, 64)


def test_pieces_are_numbered_by_their_merges(tokenizer):
    """Not by the trainer, whose numbers differ from process to process: they are the rows of the embedding."""
    merges = [tuple(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    numbered = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert numbered[:256] == sorted(numbered[:256])
    assert numbered[256:512] == [byte + "</w>" for byte in numbered[:256]]
    assert numbered[512:-2] == list(dict.fromkeys(a + b for a, b in merges))
    assert numbered[-2:] == ["<|startoftext|>", "<|endoftext|>"]


# -- the scenes


def test_captioned_scenes_are_a_function_of_their_index():
    data = CaptionedScenes(6, phrases=2, seed=0, scene_size=64)
    later = CaptionedScenes(2, phrases=2, seed=0, scene_size=64, start=4)
    assert (len(data), len(later)) == (6, 2)
    item, same = data[4], later[0]
    assert torch.equal(item.images, same.images)
    assert item[1:] == same[1:]
    assert item.images.shape == (2, 64, 64, 3)  # a scene and its twin
    assert not torch.equal(*item.images)
    assert [len(phrases) for phrases in item.phrases] == [2, 2]
    assert all(text.strip() for text, _ in [*item.captions, *item.phrases[0], *item.phrases[1]])


def test_what_is_said_of_an_image_is_true_of_it_and_tells_it_from_its_twin():
    data = CaptionedScenes(60, phrases=3, seed=0, scene_size=64)
    apart = []
    for item in (data[i] for i in range(60)):
        for nth in (0, 1):
            said = [*item.captions[nth][1], *(claims for _, claims in item.phrases[nth])]
            assert all(any(claims & there == claims for there in item.facts[nth]) for claims in said)
            for _, claims in item.phrases[nth]:
                apart.append(not any(claims & there == claims for there in item.facts[1 - nth]))
    assert sum(apart) > 0.55 * len(apart)  # a short phrase is often true of the twin too, and then left out of its loss


def test_captions_speak_of_relations_and_phrases_of_orders():
    data = CaptionedScenes(120, phrases=3, seed=0, scene_size=64)
    captions = [text for i in range(120) for text, _ in data[i].captions]
    phrases = [text for i in range(120) for own in data[i].phrases for text, _ in own]
    assert any(" above the " in text for text in captions)
    orders = {"leftmost", "rightmost", "topmost", "lowest", "bottommost", "second"}
    assert any(orders & set(text.split()) for text in phrases)
    assert not any(" above the " in text for text in phrases)


def test_a_claim_is_true_of_an_image_with_one_object_that_has_it_all():
    red, big, star = 1, 2, 4
    known = torch.tensor([[red | big, star], [red | star, 0], [big, big]])
    claims = torch.tensor([red | big, star, red | star, 0, red | big | star])
    expected = [[True, False, False], [True, True, False], [False, True, False], [True] * 3, [False] * 3]
    assert true_of(claims, known).tolist() == expected


def test_collate_knows_of_which_images_a_text_is_true(tokenizer):
    data = CaptionedScenes(4, phrases=2, seed=0, scene_size=64)
    items = [data[i] for i in range(4)]
    images, captions, phrases, caption_true, phrase_true = Collate(tokenizer)(items)
    assert images.shape == (8, 64, 64, 3)
    assert (len(captions), len(phrases)) == (8, 16)
    assert caption_true.diagonal().all()
    assert phrase_true[torch.arange(16), torch.arange(8).repeat_interleave(2)].all()
    objects = [there for item in items for there in item.facts]
    said = [phrase for item in items for own in item.phrases for phrase in own]
    for row, (_, claims) in zip(phrase_true.tolist(), said, strict=True):
        assert row == [any(claims & there == claims for there in some) for some in objects]
    parts = [claims for item in items for _, claims in item.captions]
    for row, claims in zip(caption_true.tolist(), parts, strict=True):
        assert row == [all(any(c & there == c for there in some) for c in claims) for some in objects]


def test_pretraining_may_see_every_pair_of_colour_and_shape():
    from cmmasksd.data.scenes import make_scene

    pairs = {(o.colour, o.shape) for i in range(150) for o in make_scene(0, "pretrain", i, scene_size=64).objects}
    assert pairs >= HELD_OUT
    assert len(pairs) == len(COLOURS) * len(SHAPES)


# -- the losses


def test_patches_of_twins_that_look_the_same_are_exchanged():
    images = torch.zeros(4, 32, 48, 3, dtype=torch.uint8)
    images[1, 17, 20, 2] = 1  # row 1, column 1 of 2 x 3 patches
    changed = changed_patches(images, 16)
    assert changed.nonzero().tolist() == [[0, 4], [1, 4]]
    patches = torch.arange(4.0)[:, None, None].expand(4, 6, 1)
    lent = lend_patches(patches, changed)[..., 0]
    assert lent.tolist() == [[1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0], [3] * 6, [2] * 6]


def test_twins_of_scenes_differ_where_the_object_is():
    data = CaptionedScenes(40, phrases=1, seed=0, scene_size=128)
    share = [changed_patches(data[i].images, 16).float().mean().item() for i in range(40)]
    assert min(share) > 0
    assert sum(share) / 40 < 0.3
    assert max(share) < 0.7


def test_region_similarity_is_a_smooth_maximum():
    torch.manual_seed(0)
    texts, patches = F.normalize(torch.randn(3, 5), dim=-1), F.normalize(torch.randn(2, 7, 5), dim=-1)
    cosine = torch.einsum("td,bnd->tbn", texts, patches)
    torch.testing.assert_close(region_similarity(texts, patches, 1e4), cosine.amax(-1), atol=1e-3, rtol=0)
    torch.testing.assert_close(region_similarity(texts, patches, 1e-3), cosine.mean(-1), atol=1e-3, rtol=0)
    middle = region_similarity(texts, patches, 10.0)
    assert (middle < cosine.amax(-1)).all()
    assert (middle > cosine.mean(-1)).all()


def by_hand(pooled, patches, captions, phrases, scale, caption_true=None, phrase_true=None):
    """The losses with loops; where a text is true of another image, the two are left out."""
    caption_true = caption_true or [[False] * len(pooled)] * len(captions)
    phrase_true = phrase_true or [[False] * len(pooled)] * len(phrases)

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    def loss(right, wrong):
        return math.log(sum(math.exp(x - right) for x in [right, *wrong]))

    count, each, sharp = len(pooled), len(phrases) // len(pooled), SHARPNESS
    logit = [[scale * cosine(c, p) for p in pooled] for c in captions]
    of = range(count)
    rows = [loss(logit[i][i], [logit[i][j] for j in of if j != i and not caption_true[i][j]]) for i in of]
    columns = [loss(logit[i][i], [logit[j][i] for j in of if j != i and not caption_true[j][i]]) for i in of]
    region = [
        [math.log(sum(math.exp(sharp * scale * cosine(t, v)) for v in image) / len(image)) / sharp for image in patches]
        for t in phrases
    ]
    to_image = [
        loss(row[k // each], [row[j] for j in of if j != k // each and not phrase_true[k][j]])
        for k, row in enumerate(region)
    ]
    to_phrase = [
        loss(row[i], [region[m][i] for m in range(len(phrases)) if m // each != i and not phrase_true[m][i]])
        for i, row in ((k // each, row) for k, row in enumerate(region))
    ]
    return (sum(rows) + sum(columns)) / 2 / count, (sum(to_image) + sum(to_phrase)) / 2 / len(phrases)


def test_contrastive_losses_equal_a_hand_computation():
    torch.manual_seed(1)
    parts = torch.randn(3, 4), torch.randn(3, 5, 4), torch.randn(3, 4), torch.randn(6, 4)
    losses = contrastive_losses(*parts, torch.tensor(3.0))
    expected = by_hand(*(part.tolist() for part in parts), 3.0)
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-4)

    caption_true, phrase_true = torch.rand(3, 3) < 0.4, torch.rand(6, 3) < 0.4
    losses = contrastive_losses(*parts, torch.tensor(3.0), caption_true=caption_true, phrase_true=phrase_true)
    masked = by_hand(*(part.tolist() for part in parts), 3.0, caption_true.tolist(), phrase_true.tolist())
    assert [loss.item() for loss in losses] == pytest.approx(masked, rel=1e-4)
    assert all(less < more for less, more in zip(masked, expected, strict=True))


def test_matching_features_lose_less_than_swapped_ones():
    torch.manual_seed(2)
    words = torch.randn(4, 16)
    patches = words[:, None] + 0.1 * torch.randn(4, 6, 16)
    right = contrastive_losses(words, patches, words, words.repeat_interleave(2, 0), torch.tensor(10.0))
    wrong = contrastive_losses(words, patches, words.flip(0), words.flip(0).repeat_interleave(2, 0), torch.tensor(10.0))
    assert all(a < 0.1 < 1 < b for a, b in zip(right, wrong, strict=True))


def test_the_losses_fall_on_a_batch(tokenizer):
    torch.manual_seed(0)
    clip = build_clip(micro(), tokenizer)
    towers = dual_encoder(clip)
    data = CaptionedScenes(4, phrases=2, seed=0, scene_size=64)
    images, captions, phrases, caption_true, phrase_true = Collate(tokenizer)([data[i] for i in range(4)])
    images = normalize(images.permute(0, 3, 1, 2))
    true = {"caption_true": caption_true, "phrase_true": phrase_true}
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        features, pooled = towers.image(images)
        sentences, said = towers.text(captions).sentence, towers.text(phrases).sentence
        losses = contrastive_losses(pooled, features.patches, sentences, said, clip.logit_scale.exp(), **true)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        history.append([loss.item() for loss in losses])
    assert history[-1][0] < 0.5 * history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]


def test_retrieval_gives_fractions(tokenizer):
    clip = build_clip(micro(), tokenizer)
    found = retrieval(clip, tokenizer, scenes=8)
    assert set(found) == {"R@1", "R@5", "pointing", "pointing_short", "pointing_referring"}
    assert all(0 <= value <= 1 for value in found.values())
    assert found["R@1"] <= found["R@5"]


# -- the run


def rows_of(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def test_pretrain_writes_a_clip_and_resumes_where_it_stopped(quick, tmp_path, monkeypatch):
    folder = pretrain(micro(tmp_path / "straight"))
    clip = load_clip(folder)
    assert clip.config.vision_config.hidden_size == 32
    assert load_tokenizer(folder)("red")["input_ids"] == module.train_tokenizer()("red")["input_ids"]

    real, calls = module.contrastive_losses, []

    def losses(*args, **true):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **true)

    with monkeypatch.context() as patch:
        patch.setattr(module, "contrastive_losses", losses)
        with pytest.raises(KeyboardInterrupt):
            pretrain(micro(tmp_path / "cut"))
    torch.manual_seed(7)
    random.seed(7)
    with pytest.raises(UserError, match=r"already holds a run: resume it with --resume, or .* --pretrain\.out"):
        pretrain(micro(tmp_path / "cut"))
    pretrain(micro(tmp_path / "cut", resume=True))
    straight, resumed = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("straight", "cut"))
    assert straight["step"] == resumed["step"] == 3
    for name, weight in straight["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    rows = rows_of(tmp_path / "straight")
    assert [row["step"] for row in rows] == [2, 3]
    assert rows_of(tmp_path / "cut") == rows
    assert json.loads((tmp_path / "cut" / "config.yaml").read_text())["width"] == 32

    # a finished run is left as it is
    assert pretrain(micro(tmp_path / "cut", resume=True)) == tmp_path / "cut" / "clip"
    assert rows_of(tmp_path / "cut") == rows
    with pytest.raises(UserError, match=r"batch_size must be an even number"):
        micro(batch_size=3)
    with pytest.raises(UserError, match="has had 3 steps already"):
        pretrain(micro(tmp_path / "cut", resume=True, steps=2))
    with pytest.raises(UserError, match="cannot resume from"):
        pretrain(micro(tmp_path / "cut", resume=True, width=64))
    (tmp_path / "cut" / "state.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot resume from"):
        pretrain(micro(tmp_path / "cut", resume=True))
    with pytest.raises(UserError, match="no run to resume"):
        pretrain(micro(tmp_path / "new", resume=True))


def test_pretrain_begins_with_a_trained_clip(quick, tmp_path):
    first = pretrain(micro(tmp_path / "first"))
    tokens = load_tokenizer(first).get_vocab()
    second = pretrain(micro(tmp_path / "second", init=str(first), steps=1, lr=1e-12, width=64, vision_layers=2))
    before, after = load_clip(first).state_dict(), load_clip(second).state_dict()
    assert before.keys() == after.keys()  # its sizes, not those of the settings
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)
    assert load_tokenizer(second).get_vocab() == tokens
    with pytest.raises(UserError, match=r"images of 64 pixels in patches of 16: give --pretrain\.image_size 64"):
        pretrain(PretrainConfig(out=tmp_path / "third", init=str(first)))
    with pytest.raises(UserError, match=r"no model folder \./absent"):
        pretrain(micro(tmp_path / "third", init="./absent"))
