"""Contrastive training of a small CLIP on generated scenes and their captions: `cmmasksd pretrain`.

It makes the backbone that the package ships (`assets/tiny-clip`), so that everything works without a download. The
result is an ordinary CLIP in transformers' format with its own byte-level tokenizer. No mask is ever used.

Two losses between the images and texts of a batch:

- CLIP's own: class token against the caption of the whole scene (symmetric InfoNCE; Radford et al. 2021).
- A late-interaction term, weight `region_weight`: a phrase about one object against the *patches* of every image, by
  the smooth maximum of their cosines (in the spirit of FILIP, Yao et al. 2022). CLIP's own loss gives the patch tokens
  of the last block no reason to align with words; a small model on little data needs one. Weight 0 trains a plain CLIP.

Unusual here; both points need scenes, whose truth is known:

- A text is not a negative for another image that it is true of as well ("red star" is true of many).
- Half of the images are twins: the previous scene with one object changed, and the phrases are about that object. So a
  phrase has a negative that differs only in what the phrase says. For the late interaction, patches with the same
  pixels in both twins come from the *other* image's encoding (`lend_patches`): they cannot know of the object, so only
  patches that show it can match its phrase. (Attention lets every patch know of everything; without this the best match
  may be anywhere.)
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cmmasksd.config import PretrainConfig
from cmmasksd.errors import UserError, reason
from cmmasksd.files import whole_file
from cmmasksd.model.loading import load_clip
from cmmasksd.model.pixels import normalize
from cmmasksd.model.tokenizing import load_tokenizer
from cmmasksd.model.towers.clip import dual_encoder, encoder_sizes
from cmmasksd.pretraining.captions import CaptionedBatch, CaptionedScenes, Collate
from cmmasksd.pretraining.losses import changed_patches, contrastive_losses, lend_patches
from cmmasksd.pretraining.model import build_clip, save_clip, train_tokenizer
from cmmasksd.pretraining.retrieval import retrieval
from cmmasksd.training.checkpoint import require_resumable
from cmmasksd.training.log import Log, Meter
from cmmasksd.training.optim import parameter_groups, rate_scale, set_rates

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


def pretrain(config: PretrainConfig) -> Path:
    """Train, or resume the run in `config.out`; return the folder of the finished model.

    Raises:
        UserError: `config.out` holds a run and `resume` is false, or no run and it is true; or the state of the run is
            damaged, or from another model or a longer run.
    """
    from tqdm import tqdm

    # build
    out, state_file = Path(config.out), Path(config.out) / "state.pt"
    require_resumable(state_file, out, config.resume, "--pretrain.out")
    torch.manual_seed(config.seed)
    clip, tokenizer = _build(config)
    clip.train()
    clip.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore (its decorator hides the method)
    groups = parameter_groups(clip, lr=config.lr, clip_lr_scale=1.0, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))

    # resume
    start = _restore(clip, optimizer, state_file) if config.resume else 0
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
    loader = DataLoader(data, pairs, num_workers=config.workers, collate_fn=Collate(tokenizer))
    settings = json.dumps(asdict(config) | {"resume": False}, indent=2, default=str)  # JSON is YAML
    log, meter = Log(out, settings + "\n", updates=start), Meter()
    bar = tqdm(total=config.steps, initial=start, desc="pretrain", unit="step")
    for step, batch in enumerate(loader, start=start + 1):
        # single training step
        set_rates(optimizer, rate_scale(step - 1, config.steps, warmup=config.warmup, final=0.01))
        losses = _losses(clip, batch, config)
        optimizer.zero_grad(set_to_none=True)
        (losses["loss_clip"] + config.region_weight * losses["loss_region"]).backward()
        nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        meter.add(losses, len(batch.images))
        bar.update()

        # once in a while: save, log
        saving = step % config.save_every == 0 or step == config.steps
        if step % 25 == 0 or saving:
            row = {"step": step, **meter.take("images_per_s"), "scale": clip.logit_scale.exp().clamp(max=100).item()}
            if saving:
                row |= retrieval(clip, tokenizer)
                clip.train()
                save_clip(clip, tokenizer, out / "clip")
                with whole_file(state_file) as part:
                    state = {"model": clip.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, part)
                meter.restart()  # its clock would count the retrieval
            log.write(row)
            bar.set_postfix({name: f"{row[name]:.2f}" for name in ("loss_clip", "loss_region", "images_per_s")})
    bar.close()
    log.close()
    return out / "clip"


def _build(config: PretrainConfig) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """The CLIP to train and its tokenizer: fresh ones, or those of `config.init`. A resumed run keeps its tokenizer,
    whichever version of the program made it."""
    saved = Path(config.out) / "clip"
    if config.init is None:
        if saved.is_dir():
            tokenizer = load_tokenizer(saved)
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
    return clip, load_tokenizer(saved if saved.is_dir() else config.init)


def _restore(clip: CLIPModel, optimizer: torch.optim.Optimizer, file: Path) -> int:
    """Put weights and moments back; return the number of steps done."""
    try:
        state = torch.load(file, weights_only=True, map_location=clip.device)
        clip.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"]
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        raise UserError(
            f"cannot resume from {file}: {reason(error)}. Choose another folder with --pretrain.out"
        ) from error


def _losses(clip: CLIPModel, batch: CaptionedBatch, config: PretrainConfig) -> dict[str, Tensor]:
    """Both losses of a batch, "loss_clip" and "loss_region"."""
    device, towers = clip.device, dual_encoder(clip)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
        features, pooled = towers.image(normalize(batch.images.to(device).permute(0, 3, 1, 2)))
        captions = towers.text(batch.captions.to(device)).sentence
        phrases = towers.text(batch.phrases.to(device)).sentence
    changed = changed_patches(batch.images, config.patch_size).to(device)
    loss_clip, loss_region = contrastive_losses(
        pooled,
        lend_patches(features.patches, changed),
        captions,
        phrases,
        clip.logit_scale.exp().clamp(max=100),
        caption_true=batch.caption_true.to(device),
        phrase_true=batch.phrase_true.to(device),
    )
    return {"loss_clip": loss_clip, "loss_region": loss_region}
