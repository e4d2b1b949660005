"""Class names as nouns: what an object may surely be called, and what somebody might call it.

Every class has nouns that are *true* of it. A noun is *loosely* true of the classes that people mix up with its own
("jacket" of a blazer), so that it never singles out an object beside one of those. Classes of COCO, VOC and Clothing
Co-Parsing are built in; any other class is called by its own name, unless a file of synonyms says more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from cmmasksd.data.samples import require_expression
from cmmasksd.errors import UserError, reason, shown

MAX_SYNONYMS_BYTES = 1024 * 1024
"""Larger files of synonyms are refused."""


def _classes(*lines: str) -> frozenset[str]:
    return frozenset(name for line in lines for name in line.split(","))


_NOUNS = {
    "person": ("person", "somebody", "someone"),
    "man": ("man", "guy", "person"),
    "woman": ("woman", "lady", "person"),
    "boy": ("boy", "kid", "child"),
    "girl": ("girl", "kid", "child"),
    "child": ("child", "kid"),
    "bicycle": ("bicycle", "bike"),
    "motorcycle": ("motorcycle", "motorbike"),
    "airplane": ("airplane", "plane"),
    "couch": ("couch", "sofa"),
    "dog": ("dog",),
    "cat": ("cat", "kitty"),
    "horse": ("horse",),
    "potted plant": ("potted plant", "plant"),
    "dining table": ("table",),
    "tv": ("tv", "screen"),
    "laptop": ("laptop", "laptop computer"),
    "mouse": ("computer mouse",),
    "remote": ("remote", "remote control"),
    "cell phone": ("cell phone", "phone"),
    "refrigerator": ("refrigerator", "fridge"),
    "teddy bear": ("teddy bear", "stuffed toy"),
    "hair drier": ("hair dryer",),
    "sports ball": ("ball",),
    "wine glass": ("wine glass", "glass"),
    "donut": ("donut", "doughnut"),
    "handbag": ("handbag", "bag"),
    "backpack": ("backpack", "bag"),
    "suitcase": ("suitcase",),
    "truck": ("truck",),
    "car": ("car",),
    "boat": ("boat",),
    "cup": ("cup",),
    "zebra": ("zebra",),
    "bag": ("bag",),
    "purse": ("purse", "bag"),
    "pants": ("pants", "trousers"),
    "jeans": ("jeans", "pants"),
    "shoes": ("shoes", "footwear"),
    "boots": ("boots", "shoes"),
    "heels": ("heels", "shoes"),
    "pumps": ("pumps", "shoes"),
    "flats": ("flats", "shoes"),
    "loafers": ("loafers", "shoes"),
    "sneakers": ("sneakers", "shoes"),
    "wedges": ("wedges", "shoes"),
    "sandals": ("sandals", "shoes"),
    "clogs": ("clogs", "shoes"),
    "sunglasses": ("sunglasses", "shades"),
    "glasses": ("glasses", "eyeglasses"),
    "shirt": ("shirt",),
    "t-shirt": ("t-shirt", "shirt"),
    "blouse": ("blouse", "top"),
    "sweater": ("sweater", "pullover"),
    "tie": ("tie", "necktie"),
    "bra": ("bra",),
    "stockings": ("stockings", "tights"),
    "tights": ("tights", "stockings"),
}
"""Class -> nouns that are true of each of its objects, the usual one first. Other built-in classes are their own."""

_ALIASES = {
    "aeroplane": "airplane",
    "motorbike": "motorcycle",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
    "tv monitor": "tv",
    "hair dryer": "hair drier",
    "cellphone": "cell phone",
    "human": "person",
    "pedestrian": "person",
    "t shirt": "t-shirt",
}
"""Other spellings of built-in classes."""

_KINDS = {
    "animal": _classes("bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe"),
    "vehicle": _classes("car,truck,bus,motorcycle,train"),
    "fruit": _classes("apple,banana,orange"),
}
"""Nouns that are true of several classes; said only where all classes of the image are built in."""

_MIXED_UP = (
    "car,truck,bus,train",
    "bicycle,motorcycle",
    "couch,chair,bench,bed",
    "cup,wine glass",
    "cup,bowl",
    "bottle,vase",
    "wine glass,vase",
    "fork,knife,spoon",
    "tv,laptop",
    "tv,microwave",
    "laptop,keyboard",
    "cell phone,remote",
    "oven,microwave,toaster",
    "handbag,backpack,suitcase,bag,purse,wallet,accessories",
    "teddy bear,bear",
    "teddy bear,dog",
    "teddy bear,cat",
    "sheep,cow",
    "cow,horse",
    "horse,zebra",
    "bird,kite",
    "kite,airplane",
    "skis,snowboard,surfboard,skateboard",
    "baseball bat,tennis racket",
    "sandwich,hot dog,pizza,cake,donut",
    "apple,orange,sports ball",
    "potted plant,vase",
    "dining table,bench",
    "sink,toilet,bowl",
    "stop sign,traffic light,parking meter",
    "frisbee,sports ball",
    "person,man,woman,boy,girl,child",
    "coat,jacket,blazer,cape,cardigan,vest,suit,hoodie,sweater,sweatshirt,jumper,intimate",
    "shirt,t-shirt,blouse,top,sweater,sweatshirt,hoodie,jumper,cardigan,vest,bodysuit,romper,bra,intimate",
    "dress,romper,skirt,bodysuit,swimwear,intimate",
    "pants,jeans,leggings,suit,romper,jumper,shorts",
    "leggings,tights,stockings,socks",
    "skirt,shorts",
    "shoes,boots,heels,pumps,sandals,flats,loafers,sneakers,wedges,clogs",
    "glasses,sunglasses",
    "necklace,bracelet,ring,earrings,watch,accessories",
    "scarf,cape,accessories,tie",
    "hat,accessories,hoodie,scarf",
    "belt,accessories",
    "gloves,accessories",
    "hair,hat",
)
"""Classes that people mix up: the nouns of each are loosely true of the others of its line."""

_OWN = _classes(
    "elephant,bear,giraffe,cow,sheep,bird,train,bus,traffic light,fire hydrant,stop sign,parking meter,bench,umbrella",
    "tie,frisbee,skis,snowboard,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,fork,knife",
    "spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,cake,chair,bed,toilet,keyboard,microwave",
    "oven,toaster,sink,book,clock,vase,scissors,toothbrush,accessories,belt,blazer,bodysuit,bracelet,cape,cardigan",
    "coat,dress,earrings,gloves,hair,hat,hoodie,intimate,jacket,jumper,leggings,necklace,ring,romper,scarf,shorts,skin",
    "skirt,socks,suit,sweatshirt,swimwear,top,vest,wallet,watch",
)

BUILT_IN = frozenset((*_NOUNS, *_OWN))
"""The classes whose nouns are known."""

PERSONS = frozenset(("person", "man", "woman", "boy", "girl", "child"))
ANIMALS = frozenset((*_KINDS["animal"], "teddy bear"))
PRONOUNS = frozenset(("somebody", "someone"))
"""Nouns that take neither an article nor an adjective before them."""

VAGUE = frozenset(("accessories", "intimate"))
"""Classes that no noun stands for. They are never named, but other objects are still told apart from theirs."""

BODY = frozenset(("hair", "skin"))
CARRIED = frozenset(("bag", "purse", "wallet", "handbag", "backpack", "umbrella", "suitcase"))
ADORNMENTS = _classes("belt,bracelet,earrings,glasses,gloves,hat,necklace,ring,scarf,sunglasses,tie,watch")
WORN = ADORNMENTS | _classes(
    "blazer,blouse,bodysuit,boots,bra,cape,cardigan,clogs,coat,dress,flats,heels,hoodie,jacket,jeans,jumper,leggings",
    "loafers,pants,pumps,romper,sandals,shirt,shoes,shorts,skirt,sneakers,socks,stockings,suit,sweater,sweatshirt",
    "swimwear,t-shirt,tights,top,vest,wedges",
)
"""Garments. Somebody is "in" a coat, but only "wearing" or "with" one of ADORNMENTS."""

BELOW_WAIST = _classes("skirt,pants,jeans,shorts,leggings,stockings,tights,shoes,boots,heels,sandals,socks,sneakers")
"""Of WORN: their masks begin in the lower three quarters of a person who stands."""
FROM_CHEST = frozenset(("dress", "romper", "jumper", "bodysuit", "coat"))
"""Of WORN: their masks begin in the upper third."""

GROUNDED = PERSONS | _classes(
    "cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,bicycle,car,motorcycle,bus,train,truck,boat,bench,chair,couch",
    "bed,toilet,refrigerator,oven,suitcase,potted plant,dining table,fire hydrant,parking meter",
)
"""Classes that stand on the ground: which of two is above the other in the image says which is farther away."""

SEATS = frozenset(("couch", "bed", "chair", "bench"))
MOUNTS = frozenset(("horse", "bicycle", "motorcycle", "elephant"))
BOARDS = frozenset(("skateboard", "surfboard", "snowboard"))
ON_SEATS = frozenset(("cat", "dog", "teddy bear", "laptop", "book", "remote", "cell phone", "handbag", "suitcase"))
ON_TABLES = _classes(
    "cup,bowl,bottle,fork,knife,spoon,wine glass,banana,apple,orange,sandwich,broccoli,carrot,pizza,hot dog,donut,cake",
    "laptop,keyboard,mouse,cell phone,remote,book,vase,scissors,toaster,cat,teddy bear,potted plant",
)


def class_key(name: str) -> str:
    """A class's name as this package knows it: lower case, single spaces, other spellings made one."""
    plain = " ".join(name.replace("_", " ").split()).casefold()
    spaced = plain.replace("-", " ")
    for key in (plain, spaced):
        if key in _ALIASES or key in BUILT_IN:
            return _ALIASES.get(key, key)
    return plain


class Vocabulary:
    """Nouns of classes, each with the classes that it is true of, strictly and loosely.

    Args:
        synonyms: class -> nouns that are true of each of its objects, the usual one first. They replace the built-in
            ones of that class.
    """

    def __init__(self, synonyms: Mapping[str, Iterable[str]] | None = None) -> None:
        self.synonyms = {class_key(name): tuple(nouns) for name, nouns in (synonyms or {}).items()}
        self._mixed_up: dict[str, set[str]] = {}
        for line in _MIXED_UP:
            group = line.split(",")
            for name in group:
                self._mixed_up.setdefault(name, {name}).update(group)

    def nouns(self, name: str) -> tuple[str, ...]:
        """The nouns of a class, the usual one first; none where nothing true can be said."""
        if name in self.synonyms:
            return self.synonyms[name]
        return () if name in VAGUE else _NOUNS.get(name, (name,))

    def kinds(self, name: str, present: Iterable[str]) -> tuple[str, ...]:
        """Nouns for several classes of which this is one, where all classes of the image are known."""
        if not all(other in BUILT_IN for other in present):
            return ()
        return tuple(noun for noun, classes in _KINDS.items() if name in classes)

    def strictly(self, noun: str, name: str) -> bool:
        """Whether a noun is surely true of the objects of a class."""
        return noun in self.nouns(name) or name in _KINDS.get(noun, ())

    def loosely(self, noun: str, name: str) -> bool:
        """Whether somebody might call objects of a class so."""
        around = self._mixed_up.get(name, {name})
        return any(self.strictly(noun, other) for other in (name, *around))


def read_synonyms(file: Path) -> dict[str, tuple[str, ...]]:
    """Read a YAML or JSON file that maps class names to one noun or a list of nouns.

    Raises:
        UserError: the file is missing, too large, or is not such a mapping.
    """
    import yaml

    if not file.is_file():
        raise UserError(f"synonyms {file} does not exist: check the path")
    if file.stat().st_size > MAX_SYNONYMS_BYTES:
        raise UserError(f"synonyms {file} has more than {MAX_SYNONYMS_BYTES} bytes: give class names and nouns only")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"synonyms {file} is neither YAML nor JSON ({reason(error)}): correct it") from None
    expected = "expected class names and their nouns, such as `date: [date, date fruit]`"
    if not isinstance(content, dict) or not content:
        raise UserError(f"synonyms {file} holds {shown(content)}: {expected}")
    synonyms = {}
    for name, given in content.items():
        nouns = [given] if isinstance(given, str) else given
        if not isinstance(name, str) or not isinstance(nouns, list) or not nouns:
            raise UserError(f"synonyms {file} has {shown(name)}: {shown(given)}; {expected}")
        for noun in nouns:
            if not isinstance(noun, str) or not 1 <= len(noun) <= 60:
                raise UserError(f"synonyms {file}: {shown(name)} has the noun {shown(noun)}; {expected}")
            require_expression(noun, f"synonyms {file}: a noun of {shown(name)}")
        synonyms[name] = tuple(" ".join(noun.split()).casefold() for noun in nouns)
    return synonyms
