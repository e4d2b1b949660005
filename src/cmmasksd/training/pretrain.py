"""Contrastive training of a small CLIP on generated scenes and their captions: `cmmasksd pretrain`.

It makes the backbone that the package ships (`assets/tiny-clip`), so that everything works without a download. The
result is an ordinary CLIP in transformers' format with its own byte-level tokenizer. No mask is ever used.

Two losses, both between the images and texts of a batch:

- CLIP's own: class token against the caption of the whole scene (symmetric InfoNCE; Radford et al. 2021).
- A late-interaction term, weight `region_weight`: a phrase about one object against the *patches* of every image, by
  the smooth maximum of their cosines (in the spirit of FILIP, Yao et al. 2022). CLIP's own loss leaves the patch tokens
  of the last block without any reason to align with words, and a small model on little data needs that reason. Set the
  weight to 0 for a plain CLIP.

Unusual here, and both need scenes, whose truth is known:

- A text is no negative for another image that it is true of as well ("red star" is true of many).
- Half of the images are twins: the scene before, with one object changed, and the phrases are about that one. So a
  phrase has a negative in which only what it says differs. For the late interaction, patches whose pixels are the same
  in both come from the *other* image's encoding (`lend_patches`): there they cannot know of the object, so only patches
  that show it can match its phrase. (Attention lets every patch know of everything; without this the best match may be
  anywhere.)
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cmmasksd.config import PretrainConfig
from cmmasksd.data.scenes import (
    STYLES,
    Phrase,
    Scene,
    caption,
    describe,
    facts,
    make_scene,
    referring,
    render,
    twin,
)
from cmmasksd.errors import UserError
from cmmasksd.model.clip import Tokens, encode_image, encode_text
from cmmasksd.model.modeling import load_clip
from cmmasksd.model.processing import load_tokenizer, normalize, tokenize
from cmmasksd.training.loop import Log
from cmmasksd.training.optim import parameter_groups

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


def train_tokenizer(vocabulary: int, context: int, seed: int = 0) -> PreTrainedTokenizerBase:
    """A small tokenizer of CLIP's kind (lower case, byte-level BPE: nothing is unknown), trained on scene sentences."""
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    if vocabulary < 514:
        raise UserError(f"a vocabulary of {vocabulary} cannot hold every byte: use at least 514")
    draw = random.Random(seed)
    texts = []
    for index in range(3000):
        scene = make_scene(seed, "pretrain", index, style=STYLES[index % 3])
        texts += [caption(scene, draw)[0], *(s for _, said in scene.references for s in said)]
    alphabet = sorted(_byte_alphabet())
    blank = CLIPTokenizer()
    trainer = BpeTrainer(
        vocab_size=vocabulary - 2 - len(alphabet),  # the ends of words that training did not see are added below
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        limit_alphabet=10**6,
    )
    blank.backend_tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(blank.backend_tokenizer.to_str())["model"]["merges"]
    merges: Any = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained]
    # Numbered here: the trainer's own numbers differ from process to process. Every byte may end a word, seen or not.
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={p: i for i, p in enumerate(pieces)},
        merges=merges,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ByteLevel.alphabet()


def build_clip(config: PretrainConfig, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP with fresh weights, in the sizes of the config."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": config.width, "intermediate_size": 4 * config.width, "hidden_act": "gelu"}
    tower |= {"num_attention_heads": max(1, config.width // 64), "projection_dim": config.width}
    text = tower | {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": config.text_layers,
        "max_position_embeddings": config.context,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower | {
        "num_hidden_layers": config.vision_layers,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.width))


SHARPNESS = 4.0
"""Inverse temperature of the maximum over patches, in units of CLIP's logit scale. At 1 the many patches of the
background outweigh the few of an object, and learning is slow (250 steps: pointing 28 % against 36 %)."""
REFERRING = 0.2
"""How often a phrase is a referring sentence ("leftmost star"), where its object has one; else a description."""
DROPS = (0.0, 0.5, 0.7, 0.8)
"""Of a description, how likely each attribute (and the region) is left out: one of these by chance."""


class Captioned(NamedTuple):
    """Images with texts, and what the texts claim (see `scenes.Phrase`)."""

    images: Tensor
    """(B, H, W, 3) uint8."""
    captions: list[tuple[str, list[int]]]
    """Of each image, with the claims of its parts."""
    phrases: list[list[Phrase]]
    """Of each image, about one object of it."""
    facts: list[list[int]]
    """Of each image, those of its objects."""


class CaptionedScenes(Dataset):
    """Item i: a scene and its twin, two captioned images with `phrases` texts each about the object that differs."""

    def __init__(
        self,
        count: int,
        *,
        phrases: int,
        seed: int,
        canvas: int,
        split: str = "pretrain",
        start: int = 0,
    ) -> None:
        self.count, self.phrases, self.seed = count, phrases, seed
        self.canvas, self.split, self.start = canvas, split, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Captioned:
        index += self.start
        scene = make_scene(self.seed, self.split, index, style=STYLES[index % 3], canvas=self.canvas)
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
        """A caption; half of those of scenes with sentences on relations (too long for phrases) begin with one."""
        text, claims = caption(scene, draw)
        said = [text for _, sentences in scene.references for text in sentences if _relates(text)]
        if said and draw.random() < 0.5:
            sentence = referring(draw.choice(said))
            return f"{sentence.text}, {text}", [sentence.claims, *claims]
        return text, claims

    def _phrases(self, scene: Scene, changed: int, elsewhere: list[int], draw: random.Random) -> list[Phrase]:
        """Texts about the object that tells the twins apart, and not true of the other twin (`elsewhere`: its facts) if
        that can be said at once. About any other object, patches of the background could know as much as its own."""
        said = dict(scene.references).get(changed, ())
        phrases = []
        for _ in range(self.phrases):
            if said and not _relates(said[0]) and draw.random() < REFERRING:
                phrases.append(referring(draw.choice(said)))
                continue
            tries = [describe(scene, changed, draw, drop=draw.choice(DROPS)) for _ in range(4)]
            apart = [phrase for phrase in tries if not any(map(phrase.may_be, elsewhere))]
            phrases.append((apart or tries)[0])
        return phrases


def _relates(sentence: str) -> bool:
    """Whether a sentence of a scene is about relations: those alone begin with an article."""
    return sentence.startswith("the ")


def true_of(claims: Tensor, known: Tensor) -> Tensor:
    """Whether a phrase may be true of an image: claims (T,) and facts (B, objects), bits in int64 -> (T, B) bool."""
    return ((known & claims[:, None, None]) == claims[:, None, None]).any(-1)


def region_similarity(texts: Tensor, patches: Tensor, sharpness: Tensor | float) -> Tensor:
    """Smooth maximum over patches of the cosine between a text and a patch.

    Args:
        texts: (T, D). patches: (B, N, D). Both normalised.
        sharpness: inverse temperature of the maximum.

    Returns:
        (T, B).
    """
    cosine = torch.einsum("td,bnd->tbn", texts, patches)
    return (torch.logsumexp(cosine * sharpness, dim=-1) - math.log(patches.shape[1])) / sharpness


def changed_patches(images: Tensor, size: int) -> Tensor:
    """Which patches of images (B, H, W, 3), twins side by side, differ from the twin's in any pixel: (B, N) bool."""
    differ = (images[0::2] != images[1::2]).any(-1)  # (B / 2, H, W)
    return differ.unflatten(2, (-1, size)).unflatten(1, (-1, size)).any(4).any(2).flatten(1).repeat_interleave(2, 0)


def lend_patches(patches: Tensor, changed: Tensor) -> Tensor:
    """Features (B, N, D), twins side by side: where nothing changed, those of the twin."""
    lent = patches.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return torch.where(changed[..., None], patches, lent)


def contrastive_losses(
    pooled: Tensor,
    patches: Tensor,
    captions: Tensor,
    phrases: Tensor,
    scale: Tensor,
    *,
    caption_true: Tensor | None = None,
    phrase_true: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """CLIP's loss and the late-interaction loss.

    Args:
        pooled: (B, D) image embeddings. patches: (B, N, D). captions: (B, D). phrases: (B * P, D), those of one image
            together.
        scale: inverse temperature.
        caption_true: (B, B) bool, captions by images: true where they are no negatives of each other.
        phrase_true: (B * P, B) bool, the same for phrases.
    """
    pooled, patches = F.normalize(pooled.float(), dim=-1), F.normalize(patches.float(), dim=-1)
    captions, phrases = F.normalize(captions.float(), dim=-1), F.normalize(phrases.float(), dim=-1)
    batch = pooled.shape[0]
    own = torch.arange(batch, device=pooled.device)
    logits = scale * captions @ pooled.T  # (B, B)
    if caption_true is not None:
        logits = logits.masked_fill(caption_true & (own[:, None] != own), float("-inf"))
    clip_loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    each = phrases.shape[0] // batch
    owner = own.repeat_interleave(each)  # (B * P,)
    positive = owner[:, None] == own  # (B * P, B)
    logits = scale * region_similarity(phrases, patches, SHARPNESS * scale)  # (B * P, B)
    if phrase_true is not None:
        logits = logits.masked_fill(phrase_true & ~positive, float("-inf"))
    to_image = F.cross_entropy(logits, owner)
    # image to phrase: each own phrase against the phrases of all other images
    others = torch.logsumexp(logits.masked_fill(positive, float("-inf")), dim=0)  # (B,)
    to_phrase = F.softplus(others[owner] - logits[torch.arange(len(owner)), owner]).mean()
    return clip_loss, (to_image + to_phrase) / 2


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
    vision: Any = clip.config.vision_config
    device, canvas, size = clip.device, vision.image_size, vision.patch_size
    images, texts, owners = [], [], []
    named: dict[str, list[tuple[str, list[bool]]]] = {  # text, and whether each object may be meant
        "pointing": [],
        "pointing_short": [],
        "pointing_referring": [],
    }
    for index in range(scenes):
        scene = make_scene(seed, "val", index, canvas=canvas)
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
    features, pooled = encode_image(clip, normalize(torch.stack(images).to(device).permute(0, 3, 1, 2)))
    sentence = encode_text(clip, tokenize(tokenizer, texts).to(device)).sentence
    similarity = F.normalize(sentence, dim=-1) @ F.normalize(pooled, dim=-1).T
    rank = (similarity > similarity.diag()[:, None]).sum(1)
    patches = F.normalize(features.patches, dim=-1)
    hits = {}
    for kind, pairs in named.items():
        sentence = encode_text(clip, tokenize(tokenizer, [text for text, _ in pairs]).to(device)).sentence
        best = torch.einsum("bd,bnd->bn", F.normalize(sentence, dim=-1), patches).argmax(1).cpu()
        rows, columns = best // features.grid[1] * size + size // 2, best % features.grid[1] * size + size // 2
        seen = torch.stack(owners)[torch.arange(scenes), rows, columns]
        hits[kind] = sum(owner >= 0 and pairs[i][1][owner] for i, owner in enumerate(seen.tolist())) / scenes
    return {
        "R@1": (rank < 1).float().mean().item(),
        "R@5": (rank < 5).float().mean().item(),
        **hits,
    }


def pretrain(config: PretrainConfig) -> Path:
    """Train, or go on from the last saved state in `config.out`; return the folder of the finished model.

    Raises:
        UserError: when the state in `config.out` is damaged, or of another model or a longer run.
    """
    from tqdm import tqdm

    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(config.out)
    state_file, start = out / "state.pt", 0
    clip, tokenizer = _begin(config)
    clip.train()
    clip.to(device)  # pyright: ignore (its decorator hides the method)
    groups = parameter_groups(clip, lr=config.lr, clip_lr_scale=1.0, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / max(1, config.warmup))
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps))))
        ),
    )
    out.mkdir(parents=True, exist_ok=True)
    if state_file.exists():
        try:
            state = torch.load(state_file, weights_only=True, map_location=device)
            clip.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            start = state["step"]
        except Exception as error:  # torch raises many kinds for a damaged or foreign file
            raise UserError(
                f"cannot go on from {state_file}: {error}. Choose another folder with --pretrain.out"
            ) from error
        if start > config.steps:
            raise UserError(f"{state_file} has had {start} steps already: ask for more than {config.steps}")
    pairs = config.batch_size // 2  # an item is a scene and its twin
    data = CaptionedScenes(
        (config.steps - start) * pairs,
        phrases=config.phrases,
        seed=config.seed,
        canvas=config.image_size,
        start=start * pairs,
    )
    collate = _Collate(tokenizer)
    loader = DataLoader(data, pairs, num_workers=config.workers, collate_fn=collate, persistent_workers=False)
    log = Log(out, json.dumps(asdict(config), indent=2, default=str) + "\n", updates=start)  # JSON is YAML
    bar = tqdm(total=config.steps, initial=start, desc="pretrain", unit="step")
    begin, seen = time.perf_counter(), 0
    running, count = torch.zeros(2), 0
    for step, (images, captions, phrases, caption_true, phrase_true) in enumerate(loader, start=start + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            features, pooled = encode_image(clip, normalize(images.to(device).permute(0, 3, 1, 2)))
            caption_features = encode_text(clip, captions.to(device)).sentence
            phrase_features = encode_text(clip, phrases.to(device)).sentence
        scale = clip.logit_scale.exp().clamp(max=100)
        whole, region = contrastive_losses(
            pooled,
            lend_patches(features.patches, changed_patches(images, config.patch_size).to(device)),
            caption_features,
            phrase_features,
            scale,
            caption_true=caption_true.to(device),
            phrase_true=phrase_true.to(device),
        )
        optimizer.zero_grad(set_to_none=True)
        (whole + config.region_weight * region).backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += torch.tensor([whole.item(), region.item()])
        count += 1
        seen += len(images)
        bar.update()
        saving = step % config.save_every == 0 or step == config.steps
        if step % 25 == 0 or saving:
            mean = (running / count).tolist()
            running, count = torch.zeros(2), 0
            row = {"step": step, "loss_clip": mean[0], "loss_region": mean[1], "scale": scale.item()}
            row["images_per_s"] = seen / (time.perf_counter() - begin)
            if saving:
                row |= retrieval(clip, tokenizer)
                clip.train()
                save_clip(clip, tokenizer, out / "clip")
                state = {"model": clip.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                torch.save(state | {"schedule": schedule.state_dict()}, state_file.with_suffix(".tmp"))
                state_file.with_suffix(".tmp").replace(state_file)
            log.write(row)
            bar.set_postfix(clip=f"{mean[0]:.2f}", region=f"{mean[1]:.2f}", images=f"{row['images_per_s']:.0f}/s")
    bar.close()
    log.close()
    return out / "clip"


def _begin(config: PretrainConfig) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """The CLIP to train and its tokenizer: fresh ones, or those of `config.init`. A run goes on with its own tokenizer,
    whatever version of the program made it."""
    own = Path(config.out) / "clip"
    if config.init is None:
        if own.is_dir():
            tokenizer = load_tokenizer(own)
        else:
            tokenizer = train_tokenizer(config.vocabulary, config.context, config.seed)
        return build_clip(config, tokenizer), tokenizer
    clip = load_clip(config.init)
    vision: Any = clip.config.vision_config
    if (vision.image_size, vision.patch_size) != (config.image_size, config.patch_size):
        raise UserError(
            f"{config.init} is for images of {vision.image_size} pixels in patches of {vision.patch_size}: give"
            f" --pretrain.image_size {vision.image_size} --pretrain.patch_size {vision.patch_size}"
        )
    return clip, load_tokenizer(own if own.is_dir() else config.init)


class _Collate:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: list[Captioned]) -> tuple[Tensor, Tokens, Tokens, Tensor, Tensor]:
        captions = [caption for item in items for caption in item.captions]
        phrases = [phrase for item in items for own in item.phrases for phrase in own]
        known = [objects for item in items for objects in item.facts]
        most = max(len(objects) for objects in known)
        padded = torch.tensor([objects + [0] * (most - len(objects)) for objects in known])
        parts = torch.tensor([claim for _, claims in captions for claim in claims])
        split = true_of(parts, padded).split([len(claims) for _, claims in captions])
        return (
            torch.cat([item.images for item in items]),
            tokenize(self.tokenizer, [text for text, _ in captions]),
            tokenize(self.tokenizer, [phrase.text for phrase in phrases]),
            torch.stack([part.all(0) for part in split]),
            true_of(torch.tensor([phrase.claims for phrase in phrases]), padded),
        )


def save_clip(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a CLIP in transformers' format, weights in float16 (half the size; loading returns them to float32)."""
    import copy

    half: Any = copy.deepcopy(clip).half()
    half.config.text_config.dtype = half.config.vision_config.dtype = None  # of a loaded CLIP they still say float32
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
