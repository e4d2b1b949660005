"""How good a CLIP is on scenes that it never saw: retrieval, and whether the best patch lies in the object."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from cmmasksd.data.scenes import caption, describe, facts, make_scene, render
from cmmasksd.model.processing import normalize, tokenize
from cmmasksd.model.towers.clip import dual_encoder, encoder_sizes

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


@torch.no_grad()
def retrieval(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, *, scenes: int = 256, seed: int = 1
) -> dict[str, float]:
    """Caption-to-image retrieval and pointing accuracy on scenes that training never drew (another seed, split val).

    Returns:
        "R@1", "R@5": fraction of captions whose own image ranks first, or among the first five, of `scenes` images.
        "pointing": fraction of full descriptions whose best patch has its centre inside an object they are true of.
        "pointing_short": the same for short descriptions (half of the attributes and regions left out).
        "pointing_referring": the same for referring sentences; here it must be the one object that they name.
    """
    clip.eval()
    towers, sizes = dual_encoder(clip), encoder_sizes(clip.config)
    device, size = clip.device, sizes.patch_size
    images, texts, owners = [], [], []
    named: dict[str, list[tuple[str, list[bool]]]] = {  # text, and whether each object may be meant
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
        texts.append(caption(scene, draw)[0])
        which, known = draw.randrange(len(scene.objects)), facts(scene)
        for kind, drop in (("pointing", 0.0), ("pointing_short", 0.5)):
            phrase = describe(scene, which, draw, drop=drop)
            named[kind].append((phrase.text, [phrase.may_be(there) for there in known]))
        which, said = scene.references[0]
        named["pointing_referring"].append((said[0], [i == which for i in range(len(known))]))
    features, pooled = towers.image(normalize(torch.stack(images).to(device).permute(0, 3, 1, 2)))
    sentence = towers.text(tokenize(tokenizer, texts).to(device)).sentence
    similarity = F.normalize(sentence, dim=-1) @ F.normalize(pooled, dim=-1).T
    rank = (similarity > similarity.diag()[:, None]).sum(1)
    patches = F.normalize(features.patches, dim=-1)
    hits = {}
    for kind, pairs in named.items():
        sentence = towers.text(tokenize(tokenizer, [text for text, _ in pairs]).to(device)).sentence
        best = torch.einsum("bd,bnd->bn", F.normalize(sentence, dim=-1), patches).argmax(1).cpu()
        rows, columns = best // features.grid[1] * size + size // 2, best % features.grid[1] * size + size // 2
        seen = torch.stack(owners)[torch.arange(scenes), rows, columns]
        hits[kind] = sum(owner >= 0 and pairs[i][1][owner] for i, owner in enumerate(seen.tolist())) / scenes
    return {
        "R@1": (rank < 1).float().mean().item(),
        "R@5": (rank < 5).float().mean().item(),
        **hits,
    }
