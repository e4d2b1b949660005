"""Sentences to tokens and the words they belong to, and the tokenizer of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

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
        tokenizer: any fast tokenizer that ends a sentence by its end token, such as CLIP's or SigLIP's.
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
    mask, spans = encoded["attention_mask"], encoded["offset_mapping"]
    words = []
    for nth, text in enumerate(texts):
        ids = [-1 if word is None else word for word in encoded.word_ids(nth)]
        if any(text[start:end] != text[start:end].strip() for start, end in spans[nth].tolist()):
            ids, spans[nth] = _split_at_spaces(text, ids, spans[nth])
        words.append(ids)
    encodings = encoded.encodings
    assert encodings is not None  # fast tokenizers only; from_pretrained checks
    return Tokens(
        encoded["input_ids"],
        mask,
        torch.tensor(words).masked_fill(mask == 0, -1),
        torch.tensor([bool(encoding.overflowing) for encoding in encodings]),
        spans,
    )


def _split_at_spaces(text: str, word_ids: list[int], spans: Tensor) -> tuple[list[int], Tensor]:
    """Words of a SentencePiece tokenizer, whose pieces begin with the space before them: some of these tokenizers call
    a whole sentence one word. Returns the word ids, and the spans without spaces."""
    spans, numbers, last = spans.clone(), {}, len(text.rstrip())
    for token, word in enumerate(word_ids):
        if word >= 0:
            start, end = spans[token].tolist()
            start = min(last, len(text) - len(text[start:].lstrip()))  # of the word, after a piece that is but a space
            spans[token] = torch.tensor([start, max(start, len(text[:end].rstrip()))])
            word_ids[token] = numbers.setdefault(len(text[: start + 1].split()), len(numbers))
    return word_ids, spans


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone or a trained model, by folder or hub id, or from beside a checkpoint of OpenAI or
    open_clip.

    Only its vocabulary, its special tokens and its limit are read; transformers would also act on other settings of a
    stranger's files.

    Raises:
        UserError: the files are missing or damaged, or sentences get no end token, or no start token from a CLIP's.
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
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if len(ids) < 3 or ids[-1] != end or end in ids[1:-1] or (of_clip and ids[0] != start):
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
    end = {2: last, None: tokenizer.eos_token_id}.get(sizes.end_token, sizes.end_token)
    if last >= sizes.vocabulary or tokenizer.eos_token_id != end:
        raise UserError(
            f"the tokenizer in {folder} has ids up to {last} and the end token {tokenizer.eos_token_id}, its model has "
            f"{sizes.vocabulary} ids and the end token {end}: get the tokenizer of this model"
        )
    first: Any = tokenizer("a")["input_ids"]
    if (first[0] == tokenizer.bos_token_id) != (sizes.start_token is not None):
        raise UserError(
            f"the tokenizer in {folder} begins a sentence with {first[0]}, its model expects "
            f"{'a piece' if sizes.start_token is None else 'a start token'}: get the tokenizer of this model"
        )


def lower_case(tokenizer: Any) -> None:
    """Make a tokenizer lower-case every sentence, if it does not yet."""
    from tokenizers import normalizers

    backend = tokenizer.backend_tokenizer
    if '"Lowercase"' not in backend.to_str():
        given = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *given])
