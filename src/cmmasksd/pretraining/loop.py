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
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.data import DataLoader

from cmmasksd.config import PretrainConfig
from cmmasksd.errors import UserError
from cmmasksd.model.loading import load_clip
from cmmasksd.model.processing import load_tokenizer, normalize
from cmmasksd.model.towers.clip import dual_encoder, encoder_sizes
from cmmasksd.pretraining.captions import CaptionedScenes, Collate
from cmmasksd.pretraining.losses import changed_patches, contrastive_losses, lend_patches
from cmmasksd.pretraining.model import build_clip, save_clip, train_tokenizer
from cmmasksd.pretraining.retrieval import retrieval
from cmmasksd.training.checkpoint import require_resumable
from cmmasksd.training.log import Log
from cmmasksd.training.optim import parameter_groups

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


def pretrain(config: PretrainConfig) -> Path:
    """Train, or resume the run in `config.out`; return the folder of the finished model.

    Raises:
        UserError: `config.out` holds a run and `resume` is false, or no run and it is true; or the state of the run is
            damaged, or of another model or a longer run.
    """
    from tqdm import tqdm

    out, start = Path(config.out), 0
    state_file = out / "state.pt"
    require_resumable(state_file, out, config.resume, "--pretrain.out")
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip, tokenizer = _begin(config)
    clip.train()
    clip.to(device)  # pyright: ignore (its decorator hides the method)
    towers = dual_encoder(clip)
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
    if config.resume:
        try:
            state = torch.load(state_file, weights_only=True, map_location=device)
            clip.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            start = state["step"]
        except Exception as error:  # torch raises many kinds for a damaged or foreign file
            raise UserError(
                f"cannot resume from {state_file}: {error}. Choose another folder with --pretrain.out"
            ) from error
        if start > config.steps:
            raise UserError(f"{state_file} has had {start} steps already: ask for more than {config.steps}")
    pairs = config.batch_size // 2  # an item is a scene and its twin
    data = CaptionedScenes(
        (config.steps - start) * pairs,
        phrases=config.phrases,
        seed=config.seed,
        scene_size=config.image_size,
        start=start * pairs,
    )
    collate = Collate(tokenizer)
    loader = DataLoader(data, pairs, num_workers=config.workers, collate_fn=collate, persistent_workers=False)
    settings = json.dumps(asdict(config) | {"resume": False}, indent=2, default=str)  # JSON is YAML
    log = Log(out, settings + "\n", updates=start)
    bar = tqdm(total=config.steps, initial=start, desc="pretrain", unit="step")
    begin, seen = time.perf_counter(), 0
    running, count = torch.zeros(2), 0
    for step, (images, captions, phrases, caption_true, phrase_true) in enumerate(loader, start=start + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            features, pooled = towers.image(normalize(images.to(device).permute(0, 3, 1, 2)))
            caption_features = towers.text(captions.to(device)).sentence
            phrase_features = towers.text(phrases.to(device)).sentence
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
    sizes = encoder_sizes(clip.config)
    if (sizes.image_size, sizes.patch_size) != (config.image_size, config.patch_size):
        raise UserError(
            f"{config.init} is for images of {sizes.image_size} pixels in patches of {sizes.patch_size}: give"
            f" --pretrain.image_size {sizes.image_size} --pretrain.patch_size {sizes.patch_size}"
        )
    return clip, load_tokenizer(own if own.is_dir() else config.init)
