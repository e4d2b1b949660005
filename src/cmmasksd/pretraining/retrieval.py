"""Scores of a CLIP on scenes that it never saw: retrieval, and whether the best patch lies in the object."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cmmasksd.data.scenes import caption, describe, facts, make_scene, render
from cmmasksd.model.pixels import normalize
from cmmasksd.model.tokenizing import tokenize
from cmmasksd.model.towers.clip import dual_encoder, encoder_sizes

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


@torch.no_grad()
def retrieval(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, *, scenes: int = 256, seed: int = 1
) -> dict[str, float]:
    """Caption-to-image retrieval and pointing accuracy on scenes that training never drew (another seed, split val).

    Returns:
        "R@1", "R@5": fraction of captions whose image ranks first, or among the first five, of `scenes` images.
        "pointing": fraction of full descriptions whose best patch has its centre in an object that they are true of.
        "pointing_short": the same for short descriptions (half of the attributes and regions left out).
        "pointing_referring": the same for referring sentences, which are true of one object only.
    """
    clip.eval()
    towers, sizes = dual_encoder(clip), encoder_sizes(clip.config)
    device, size = clip.device, sizes.patch_size
    images, captions, owners = [], [], []
    pointing: dict[str, list[tuple[str, list[bool]]]] = {  # phrase, and whether it may mean each object
        "pointing": [],
        "pointing_short": [],
        "pointing_referring": [],
    }
    for index in range(scenes):
        scene = make_scene(seed, "val", index, scene_size=sizes.image_size)
        draw = random.Random(f"{seed}/retrieval/{index}")
        image, owner = render(scene)
        images.append(torch.from_numpy(image))
        owners.append(torch.from_numpy(owner))
        captions.append(caption(scene, draw)[0])
        described = draw.randrange(len(scene.objects))
        for kind, drop in (("pointing", 0.0), ("pointing_short", 0.5)):
            phrase = describe(scene, described, draw, drop=drop)
            pointing[kind].append((phrase.text, [phrase.may_be(facts_of_object) for facts_of_object in facts(scene)]))
        target, sentences = scene.references[0]
        pointing["pointing_referring"].append((sentences[0], [i == target for i in range(len(scene.objects))]))
    features, pooled = towers.image(normalize(torch.stack(images).to(device).permute(0, 3, 1, 2)))
    sentence = towers.text(tokenize(tokenizer, captions).to(device)).sentence
    similarity = F.normalize(sentence, dim=-1) @ F.normalize(pooled, dim=-1).T
    rank = (similarity > similarity.diag()[:, None]).sum(1)
    patches = F.normalize(features.patches, dim=-1)
    hits = {}
    for kind, pairs in pointing.items():
        sentence = towers.text(tokenize(tokenizer, [text for text, _ in pairs]).to(device)).sentence
        best = torch.einsum("bd,bnd->bn", F.normalize(sentence, dim=-1), patches).argmax(1).cpu()
        rows, columns = best // features.grid[1] * size + size // 2, best % features.grid[1] * size + size // 2
        pointed = torch.stack(owners)[torch.arange(scenes), rows, columns].tolist()
        hits[kind] = sum(owner >= 0 and meant[owner] for owner, (_, meant) in zip(pointed, pairs, strict=True)) / scenes
    return {
        "R@1": (rank < 1).float().mean().item(),
        "R@5": (rank < 5).float().mean().item(),
        **hits,
    }
