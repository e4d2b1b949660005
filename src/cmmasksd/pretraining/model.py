"""The small CLIP: its tokenizer, its sizes, and its files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmmasksd.config import PretrainConfig
from cmmasksd.data.scenes import STYLES, caption, make_scene
from cmmasksd.errors import UserError

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
        texts += [caption(scene, draw)[0], *(text for _, sentences in scene.references for text in sentences)]
    alphabet = sorted(_byte_alphabet())
    blank = CLIPTokenizer()
    trainer = BpeTrainer(
        vocab_size=vocabulary - 2 - len(alphabet),  # bytes that end a word are added below
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        limit_alphabet=10**6,
    )
    blank.backend_tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(blank.backend_tokenizer.to_str())["model"]["merges"]
    merges: Any = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained]
    # Numbered here, because the trainer's own numbers differ between processes. Every byte may end a word.
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *(a + b for a, b in merges)]
    pieces = [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)},
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


def save_clip(clip: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a CLIP and its tokenizer in transformers' format, weights in float16."""
    from cmmasksd.model.loading import save_float16

    save_float16(clip, folder)
    tokenizer.save_pretrained(folder)
