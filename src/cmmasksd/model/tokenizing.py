"""Sentences to tokens and the words they belong to, and the tokenizer of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from cmmasksd.data.samples import require_expression
from cmmasksd.errors import UserError, reason, shown
from cmmasksd.model.locating import (
    TOKENIZER_BYTES,
    TOKENIZER_FILES,
    backbone_folder,
    no_panic,
    read_json,
    require,
    small,
)
from cmmasksd.model.towers.base import EncoderSizes, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOKENS = 4096
_SETTINGS = ("bos_token", "eos_token", "unk_token", "pad_token", "added_tokens_decoder", "model_max_length")


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int | None = None) -> Tokens:
    """Tokenise sentences and say which word each token belongs to.

    Args:
        tokenizer: any fast tokenizer with start and end tokens, such as CLIP's.
        texts: B sentences.
        max_tokens: maximum number of tokens per sentence, start and end included; longer sentences lose their last
            words, never the end token. None: the tokenizer's own limit.

    Raises:
        UserError: a sentence is blank or not UTF-8.
    """
    for text in texts:
        require_expression(text, "a sentence")
    encoded = tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=max_tokens,
        split_special_tokens=True,  # a user who types "<|endoftext|>" does not end the sentence
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    words = [[-1 if word is None else word for word in encoded.word_ids(i)] for i in range(len(texts))]
    mask = encoded["attention_mask"]
    encodings = encoded.encodings
    assert encodings is not None  # fast tokenizers only; from_pretrained checks
    return Tokens(
        encoded["input_ids"],
        mask,
        torch.tensor(words).masked_fill(mask == 0, -1),
        torch.tensor([bool(encoding.overflowing) for encoding in encodings]),
        encoded["offset_mapping"],
    )


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a CLIP, by folder or hub id, or from beside a checkpoint of OpenAI or open_clip.

    Only its vocabulary, its special tokens and its limit are read; transformers would also act on other settings of a
    stranger's files.

    Raises:
        UserError: the files are missing or damaged, or sentences get no start and end token.
    """
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    folder = backbone_folder(name, TOKENIZER_FILES)
    if not all((folder / file).is_file() for file in ("vocab.json", "merges.txt")):  # the files of old CLIPs
        remedy = "get the tokenizer's files too (that of OpenAI's and open_clip's CLIPs: openai/clip-vit-base-patch32)"
        require(folder, ("tokenizer.json",), remedy)
    settings = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= read_json(folder / file) if (folder / file).is_file() else {}
    of_clip = settings.get("tokenizer_class", "CLIPTokenizer") in ("CLIPTokenizer", "CLIPTokenizerFast")
    kind: Any = CLIPTokenizer if of_clip else PreTrainedTokenizerFast
    with TemporaryDirectory() as clean:
        for file in ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"):
            if (folder / file).is_file():
                shutil.copyfile(small(folder / file, TOKENIZER_BYTES), Path(clean) / file)
        kept = {key: settings[key] for key in _SETTINGS if key in settings}
        (Path(clean) / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
        try:
            with no_panic():
                tokenizer = kind.from_pretrained(clean, local_files_only=True)
                limit = tokenizer.model_max_length
                if not isinstance(limit, int | float) or not limit >= 3:
                    raise UserError(f"model_max_length is {shown(limit)}, expected at least 3")
                tokenizer.model_max_length = int(min(limit, MAX_TOKENS))
                tokenizer.padding_side = tokenizer.truncation_side = "right"
                ids = tokenizer("a red é 1", padding=True, truncation=True)["input_ids"]
        except Exception as error:  # what the two libraries raise for damaged files has no common class
            raise UserError(
                f"the tokenizer in {folder} cannot be read ({reason(error)}): get its files again"
            ) from None
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if len(ids) < 3 or [ids[0], ids[-1]] != ends or ends[1] in ids[1:-1]:
        raise UserError(
            f"the tokenizer in {folder} gives {shown(ids)} for a sentence, expected its start, pieces and its "
            "end: get its files again"
        )
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, sizes: EncoderSizes, folder: Path) -> None:
    """Refuse the tokenizer of another model, which would give wrong masks without an error.

    Raises:
        UserError: its ids do not fit the encoder.
    """
    last = max(tokenizer.get_vocab().values())
    # the first CLIPs in transformers' format say 2, and mean the last id
    end = last if sizes.end_token == 2 else sizes.end_token
    if last >= sizes.vocabulary or tokenizer.eos_token_id != end:
        raise UserError(
            f"the tokenizer in {folder} has ids up to {last} and the end token {tokenizer.eos_token_id}, its model has "
            f"{sizes.vocabulary} ids and the end token {end}: get the tokenizer of this model"
        )
