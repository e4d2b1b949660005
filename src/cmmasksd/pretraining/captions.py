"""Training data: pairs of scenes that differ in one object, with captions, phrases, and what each text claims."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cmmasksd.data.scenes import STYLES, Phrase, Scene, caption, describe, facts, make_scene, referring, render, twin
from cmmasksd.model.tokenizing import tokenize
from cmmasksd.model.towers.base import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REFERRING = 0.2
"""Chance that a phrase is a referring sentence ("leftmost star") where its object has one; else it is a description."""
DROPS = (0.0, 0.5, 0.7, 0.8)
"""Chances, one of them drawn per description, that each of its attributes (and the region) is left out."""


class Captioned(NamedTuple):
    """Images with texts, and what the texts claim (see `scenes.Phrase`)."""

    images: Tensor
    """(B, H, W, 3) uint8."""
    captions: list[tuple[str, list[int]]]
    """One per image, with the claims of its parts."""
    phrases: list[list[Phrase]]
    """Several per image, about one of its objects."""
    facts: list[list[int]]
    """One per object, for each image."""


class CaptionedBatch(NamedTuple):
    """B images, twins side by side, with P phrases each."""

    images: Tensor
    """(B, H, W, 3) uint8."""
    captions: Tokens
    """B captions."""
    phrases: Tokens
    """B * P phrases, those of one image together."""
    caption_true: Tensor
    """(B, B) bool, captions by images: whether the caption may be true of the image."""
    phrase_true: Tensor
    """(B * P, B) bool, the same for phrases."""


class CaptionedScenes(Dataset):
    """Item i: a scene and its twin, two captioned images with `phrases` texts each about the object that differs."""

    def __init__(
        self,
        count: int,
        *,
        phrases: int,
        seed: int,
        scene_size: int,
        split: str = "pretrain",
        start: int = 0,
    ) -> None:
        self.count, self.phrases, self.seed = count, phrases, seed
        self.scene_size, self.split, self.start = scene_size, split, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Captioned:
        index += self.start
        scene = make_scene(self.seed, self.split, index, style=STYLES[index % 3], scene_size=self.scene_size)
        draw = random.Random(f"{self.seed}/{self.split}/{index}/captions")
        other, changed = twin(scene, draw)
        pair, known = (scene, other), [facts(scene), facts(other)]
        return Captioned(
            torch.stack([torch.from_numpy(render(view)[0]) for view in pair]),
            [self._caption(view, draw) for view in pair],
            [self._phrases(view, changed, known[1 - i], draw) for i, view in enumerate(pair)],
            known,
        )

    def _caption(self, scene: Scene, draw: random.Random) -> tuple[str, list[int]]:
        """A caption. If the scene has sentences about relations (too long for phrases), half of its captions begin with
        one."""
        text, claims = caption(scene, draw)
        relations = [text for _, sentences in scene.references for text in sentences if _relates(text)]
        if relations and draw.random() < 0.5:
            sentence = referring(draw.choice(relations))
            return f"{sentence.text}, {text}", [sentence.claims, *claims]
        return text, claims

    def _phrases(self, scene: Scene, changed: int, elsewhere: list[int], draw: random.Random) -> list[Phrase]:
        """Texts about the object that tells the twins apart, if possible not true of the other twin (`elsewhere`: its
        facts). Background patches could know as much about any other object as its own patches do."""
        sentences = dict(scene.references).get(changed, ())
        phrases = []
        for _ in range(self.phrases):
            if sentences and not _relates(sentences[0]) and draw.random() < REFERRING:
                phrases.append(referring(draw.choice(sentences)))
                continue
            tries = [describe(scene, changed, draw, drop=draw.choice(DROPS)) for _ in range(4)]
            apart = [phrase for phrase in tries if not any(map(phrase.may_be, elsewhere))]
            phrases.append((apart or tries)[0])
        return phrases


def _relates(sentence: str) -> bool:
    """Whether a sentence of a scene is about relations; only those begin with an article."""
    return sentence.startswith("the ")


def true_of(claims: Tensor, known: Tensor) -> Tensor:
    """Whether a phrase may be true of an image: claims (T,) and facts (B, objects), bits in int64 -> (T, B) bool."""
    return ((known & claims[:, None, None]) == claims[:, None, None]).any(-1)


class Collate:
    """Items of `CaptionedScenes` to a batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: list[Captioned]) -> CaptionedBatch:
        captions = [caption for item in items for caption in item.captions]
        phrases = [phrase for item in items for of_image in item.phrases for phrase in of_image]
        known = [objects for item in items for objects in item.facts]
        most = max(len(objects) for objects in known)
        padded = torch.tensor([objects + [0] * (most - len(objects)) for objects in known])
        parts = torch.tensor([claim for _, claims in captions for claim in claims])
        split = true_of(parts, padded).split([len(claims) for _, claims in captions])
        return CaptionedBatch(
            torch.cat([item.images for item in items]),
            tokenize(self.tokenizer, [text for text, _ in captions]),
            tokenize(self.tokenizer, [phrase.text for phrase in phrases]),
            torch.stack([part.all(0) for part in split]),
            true_of(torch.tensor([phrase.claims for phrase in phrases]), padded),
        )
