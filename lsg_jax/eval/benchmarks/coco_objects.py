"""The 80 objects of COCO in captions, by the algorithm of CHAIR (Rohrbach et al., 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lsg_jax.errors import InputError
from lsg_jax.eval.words import singular, tokens

# fmt: off
OBJECTS: dict[str, tuple[str, ...]] = {
    "person": ("man", "woman", "boy", "girl", "child", "kid", "baby", "adult", "people", "lady", "guy", "gentleman", "player",
               "rider", "skier", "snowboarder", "surfer", "skateboarder", "pedestrian", "driver", "worker"),
    "bicycle": ("bike",), "car": ("automobile", "taxi", "cab", "van", "suv", "sedan", "jeep"),
    "motorcycle": ("motorbike", "scooter", "moped"), "airplane": ("aeroplane", "plane", "aircraft", "jet"),
    "bus": ("minibus",), "train": ("locomotive",), "truck": ("lorry", "pickup"),
    "boat": ("ship", "sailboat", "canoe", "kayak", "yacht", "ferry", "rowboat"),
    "traffic light": ("stoplight", "stop light", "traffic signal"), "fire hydrant": ("hydrant",), "stop sign": (),
    "parking meter": (), "bench": (), "bird": ("duck", "goose", "seagull", "gull", "pigeon", "parrot", "owl", "swan", "eagle"),
    "cat": ("kitten",), "dog": ("puppy",), "horse": ("pony", "foal"), "sheep": ("lamb", "ram"),
    "cow": ("cattle", "bull", "calf", "ox"), "elephant": (), "bear": (), "zebra": (), "giraffe": (),
    "backpack": ("rucksack", "knapsack"), "umbrella": ("parasol",), "handbag": ("purse",), "tie": ("necktie", "bow tie"),
    "suitcase": ("suit case", "luggage"), "frisbee": (), "skis": ("ski",), "snowboard": (), "sports ball": ("ball",),
    "kite": (), "baseball bat": (), "baseball glove": (), "skateboard": (), "surfboard": (),
    "tennis racket": ("racket", "racquet", "tennis racquet"), "bottle": (), "wine glass": ("wineglass",), "cup": ("mug",),
    "fork": (), "knife": (), "spoon": (), "bowl": (), "banana": (), "apple": (),
    "sandwich": ("burger", "hamburger", "cheeseburger"), "orange": (), "broccoli": (), "carrot": (), "hot dog": ("hotdog",),
    "pizza": (), "donut": ("doughnut",), "cake": ("cupcake", "cheesecake"), "chair": ("stool", "seat", "armchair"),
    "couch": ("sofa",), "potted plant": ("houseplant",), "bed": (), "dining table": ("table", "desk"),
    "toilet": ("urinal",), "tv": ("television", "monitor"), "laptop": ("computer", "notebook"), "mouse": (), "remote": (),
    "keyboard": (), "cell phone": ("phone", "cellphone", "mobile phone", "telephone", "smartphone"), "microwave": (),
    "oven": ("stove",), "toaster": (), "sink": (), "refrigerator": ("fridge", "freezer"), "book": (), "clock": (),
    "vase": (), "scissors": (), "teddy bear": ("teddy",), "hair drier": ("hair dryer", "hairdryer"), "toothbrush": (),
}
# fmt: on
"""Name -> other words for it: our own short list, used where the user has no `synonyms.txt`."""

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")


@dataclass(frozen=True)
class Vocabulary:
    """Words for objects, as captions are searched for them.

    Attributes:
        objects: word, of one or two parts -> name of the object.
        pairs: two words in a row -> the one that they count as; some are no object (`home plate`).
        parts: the single words among which plurals are recognised.
    """

    objects: Mapping[str, str]
    pairs: Mapping[str, str]
    parts: frozenset[str]

    def mentions(self, caption: str) -> list[str]:
        """The names of the objects in a caption, in order, one for each time that one is mentioned.

        Qualifiers are no persons (`baby elephant`, `passenger train`), and the seat of a toilet is no chair.
        """
        words = [singular(word, self.parts) for word in tokens(caption.lower())]
        found, i = [], 0
        while i < len(words):
            pair = self.pairs.get(" ".join(words[i : i + 2]))
            found.append(pair or words[i])
            i += 2 if pair else 1
        if "toilet" in found:
            found = [word for word in found if word != "seat"]
        return [self.objects[word] for word in found if word in self.objects]


def vocabulary(groups: Sequence[Sequence[str]]) -> Vocabulary:
    """The vocabulary of groups of words, each with the name of its object first."""
    objects = {word: group[0] for group in groups for word in group}
    pairs = {word: word for word in map(str.strip, (*objects, "home plate", "train track")) if word.count(" ") == 1}
    pairs |= {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS}
    pairs |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
    pairs |= {"bow tie": "tie", "toilet seat": "toilet"}
    return Vocabulary(objects, pairs, frozenset(part for word in (*objects, *pairs) for part in word.split()))


def by_rule() -> Vocabulary:
    """The vocabulary of OBJECTS."""
    return vocabulary([(name, *others) for name, others in OBJECTS.items()])


def from_synonyms(text: str, where: str) -> Vocabulary:
    """The vocabulary of the owner's `synonyms.txt`: a line for each object, its name first, split at `, ` as by the owner.

    So an entry after two spaces, as there are in that file (`cheesecake`), is no word for its object.

    Raises:
        InputError: an object of COCO is not in it.
    """
    found = vocabulary([line.strip().split(", ") for line in text.splitlines() if line.strip()])
    if missing := [name for name in OBJECTS if name not in found.objects]:
        raise InputError(f"{where}: no line has {', '.join(missing)}; expected the synonyms of COCO's 80 objects, one a line")
    return found
