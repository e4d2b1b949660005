"""Contrastive training of a small CLIP on generated scenes and their captions: `cmmasksd pretrain`.

It makes the backbone that the package ships (`assets/tiny-clip`), so that everything works without a download. The
result is an ordinary CLIP in transformers' format with its own byte-level tokenizer. No mask is ever used.

Two losses, both between the images and texts of a batch:

- CLIP's own: class token against the caption of the whole scene (symmetric InfoNCE; Radford et al. 2021).
- A late-interaction term, weight `region_weight`: a phrase about one object against the *patches* of every image, by
  the smooth maximum of their cosines (in the spirit of FILIP, Yao et al. 2022). CLIP's own loss leaves the patch tokens
  of the last block without any reason to align with words, and a small model on little data needs that reason. Set the
  weight to 0 for a plain CLIP.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from cmmasksd.config import PretrainConfig
from cmmasksd.data.scenes import STYLES, Scene, caption, describe, make_scene, render
from cmmasksd.errors import UserError
from cmmasksd.model.clip import Tokens, encode_image, encode_text
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
        texts += [caption(scene, draw), *(s for _, said in scene.references for s in said)]
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


REFERRING = 0.35
"""How often a phrase is a referring sentence ("leftmost star"), where its object has one; else a full description."""


class CaptionedScenes(Dataset):
    """Item i: an image (H, W, 3) uint8, its caption, and `phrases` texts that each name one of its objects."""

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

    def __getitem__(self, index: int) -> tuple[Tensor, str, list[str]]:
        index += self.start
        scene = make_scene(self.seed, self.split, index, style=STYLES[index % 3], canvas=self.canvas)
        draw = random.Random(f"{self.seed}/{self.split}/{index}/captions")
        return torch.from_numpy(render(scene)[0]), caption(scene, draw), self._phrases(scene, draw)

    def _phrases(self, scene: Scene, draw: random.Random) -> list[str]:
        """Texts about different objects: full descriptions, which few other scenes match, and referring sentences."""
        order = list(range(len(scene.objects)))
        draw.shuffle(order)
        said = dict(scene.references)
        texts = []
        for k in range(self.phrases):
            which = order[k % len(order)]
            if which in said and draw.random() < REFERRING:
                texts.append(draw.choice(said[which]))
            else:
                texts.append(describe(scene, which, draw, drop=draw.choice((0.0, 0.0, 0.15))))
        return texts


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


def contrastive_losses(
    pooled: Tensor, patches: Tensor, captions: Tensor, phrases: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """CLIP's loss and the late-interaction loss.

    Args:
        pooled: (B, D) image embeddings. patches: (B, N, D). captions: (B, D). phrases: (B * P, D), those of one image
            together.
        scale: inverse temperature.
    """
    pooled, patches = F.normalize(pooled.float(), dim=-1), F.normalize(patches.float(), dim=-1)
    captions, phrases = F.normalize(captions.float(), dim=-1), F.normalize(phrases.float(), dim=-1)
    batch = pooled.shape[0]
    own = torch.arange(batch, device=pooled.device)
    logits = scale * captions @ pooled.T  # (B, B)
    clip_loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    each = phrases.shape[0] // batch
    owner = own.repeat_interleave(each)  # (B * P,)
    logits = scale * region_similarity(phrases, patches, scale)  # (B * P, B)
    to_image = F.cross_entropy(logits, owner)
    # image to phrase: each own phrase against the phrases of all other images
    positive = owner[:, None] == own  # (B * P, B)
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
        "pointing": fraction of full descriptions whose best patch has its centre inside the object they name.
        "pointing_referring": the same for short referring sentences.
    """
    clip.eval()
    vision: Any = clip.config.vision_config
    device, canvas, size = clip.device, vision.image_size, vision.patch_size
    images, texts, owners = [], [], []
    named: dict[str, list[tuple[str, int]]] = {"pointing": [], "pointing_referring": []}  # text, object
    for index in range(scenes):
        scene = make_scene(seed, "val", index, canvas=canvas)
        draw = random.Random(f"{seed}/retrieval/{index}")
        image, owner = render(scene)
        images.append(torch.from_numpy(image))
        owners.append(torch.from_numpy(owner))
        texts.append(caption(scene, draw))
        which = draw.randrange(len(scene.objects))
        named["pointing"].append((describe(scene, which, draw), which))
        which, said = scene.references[0]
        named["pointing_referring"].append((said[0], which))
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
        hits[kind] = (seen == torch.tensor([which for _, which in pairs])).float().mean().item()
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
    if (out / "clip").is_dir():  # its own, whatever version of the program made it
        tokenizer = load_tokenizer(out / "clip")
    else:
        tokenizer = train_tokenizer(config.vocabulary, config.context, config.seed)
    clip = build_clip(config, tokenizer).train()
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
    data = CaptionedScenes(
        (config.steps - start) * config.batch_size,
        phrases=config.phrases,
        seed=config.seed,
        canvas=config.image_size,
        start=start * config.batch_size,
    )
    collate = _Collate(tokenizer)
    loader = DataLoader(
        data, config.batch_size, num_workers=config.workers, collate_fn=collate, persistent_workers=False
    )
    log = Log(out, json.dumps(asdict(config), indent=2, default=str) + "\n", updates=start)  # JSON is YAML
    bar = tqdm(total=config.steps, initial=start, desc="pretrain", unit="step")
    begin, seen = time.perf_counter(), 0
    running, count = torch.zeros(2), 0
    for step, (images, captions, phrases) in enumerate(loader, start=start + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            features, pooled = encode_image(clip, normalize(images.to(device).permute(0, 3, 1, 2)))
            caption_features = encode_text(clip, captions.to(device)).sentence
            phrase_features = encode_text(clip, phrases.to(device)).sentence
        scale = clip.logit_scale.exp().clamp(max=100)
        whole, region = contrastive_losses(pooled, features.patches, caption_features, phrase_features, scale)
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


class _Collate:
    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: list[tuple[Tensor, str, list[str]]]) -> tuple[Tensor, Tokens, Tokens]:
        images, captions, phrases = zip(*items, strict=True)
        texts = [text for of_image in phrases for text in of_image]
        return torch.stack(images), tokenize(self.tokenizer, list(captions)), tokenize(self.tokenizer, texts)


def save_clip(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a CLIP in transformers' format, weights in float16 (half the size; loading returns them to float32)."""
    import copy

    copy.deepcopy(clip).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
