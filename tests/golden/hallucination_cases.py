"""What `record_hallucination.py` gives to the owners' scorers: made captions, answers and tables."""

CAPTIONS = [
    "A man rides a bike past two parked cars and a fire hydrant.",
    "Two men, three women and some children play baseball with baseball bats and a baseball glove.",
    "A baby elephant walks beside an adult zebra; a baby sleeps.",
    "The passenger train passes a passenger jet. The passenger waits.",
    "The toilet seat is up.",
    "The seat of the toilet is up, and there is a chair and a seat.",
    "A person sits on a seat.",
    "He wears a bow tie and a tie.",
    "A hot dog and hot dogs; the dog is hot.",
    "The home plate is clean, but the plane is not.",
    "A train track runs by the train.",
    "Traffic, light and street: traffic lights at the stop sign.",
    "Wine glasses on dining tables, a table and a glass of wine.",
    "The dog's leash hangs from the cats' toy.",
    "A teddy bear, teddy bears and a bear in a zoo.",
    "A cat/dog and a teddy-bear.",
    "TVs, laptops and cell phones, CELL PHONE!",
    "Knives, forks and spoons; geese, mice, sheep and oxen.",
    "A pair of scissors, skis and a pair of ski poles with a hair drier.",
    "People (some with umbrellas) board a boat near the bench.",
    "There is nothing of note here.",
    "A sports ball and tennis rackets; the tennis ball is yellow.",
    "Potted plants, vases, clocks, toothbrushes, sandwiches, couches and benches.",
    "A parking meter. Parking meters! A microwave oven? A refrigerator...",
]
PLURALS = {
    "person": "people", "bus": "buses", "bench": "benches", "sheep": "sheep", "skis": "skis", "wine glass": "wine glasses",
    "knife": "knives", "sandwich": "sandwiches", "couch": "couches", "mouse": "mice", "scissors": "scissors",
    "toothbrush": "toothbrushes", "broccoli": "broccoli",
}  # fmt: skip
"""Of the names of objects, those that do not end in s alone."""

YES_NO_TABLE = [  # category, subcategory, visual_input, set, figure, question, true answer, what is said
    ("VD", "illusion", "1", "0", "0", "0", "1", "yes"), ("VD", "illusion", "1", "0", "0", "1", "0", "no"),
    ("VD", "illusion", "2", "0", "1", "0", "0", "no"), ("VD", "illusion", "2", "0", "1", "1", "1", "no"),
    ("VD", "ocr", "1", "0", "0", "0", "1", "I cannot tell"), ("VD", "ocr", "2", "0", "1", "0", "0", "no"),
    ("VS", "chart", "0", "0", "0", "0", "1", "It is unclear."), ("VS", "chart", "1", "0", "1", "0", "1", "yes"),
    ("VS", "chart", "2", "0", "2", "0", "0", "no"), ("VS", "chart", "0", "0", "0", "1", "0", "yes"),
    ("VS", "chart", "1", "0", "1", "1", "0", "no"), ("VS", "chart", "2", "0", "2", "1", "1", "no"),
    ("VS", "map", "0", "3", "0", "0", "0", "no"), ("VS", "map", "1", "3", "1", "0", "0", "no"),
    ("VS", "ocr", "0", "0", "0", "0", "1", "yes"), ("VS", "ocr", "1", "0", "1", "0", "1", "Yes!"),
]  # fmt: skip

MMVP_ROW = {"Question": "Is the door open?", "Options": "(a) Open (b) Closed shut", "Index": 1}
MMVP_OUTPUTS = [
    "A", "B", "a", "b.", "(a)", "(B)", "A.", "B. Closed", "(b) Closed shut", "Open", "closed shut", "Closed", "The answer is A",
    "answer: b", "Answer is (B).", "Option A", "option b is right", "A door", "Because", "I think A", "it is B indeed", "Bad",
    "", "C", "both A and B", "The correct answer is: a", "open.", "B)", "a closed door", "closed shut.", "The door is Open",
]  # fmt: skip

MMSTAR_OUTPUTS = [
    "A", "b", "C.", "(d", "(A) x", "option b", "Option C: x", "the answer is d", "The answer is A.", "the answer is: a",
    "answer: b", "A cat", "Because", "", " b\n", "\nc", "[A]", "it is B", "option", "the answer is ", "(", "( a", "Dog", "ab",
    "(B)", "E", "é",
]  # fmt: skip

RELATION = {
    "sky": [], "forest": ["tree", "bush"], "tree": ["forest", "bush"], "person": ["people", "man"], "ship": ["boat"],
    "cloud": [], "sun": [], "dog": [], "lake": ["water"], "light": [],
}  # fmt: skip
SAFE = ["light", "line"]
SCENES = [  # truth, hallu, nouns of the description
    (["sky", "forest", "person", "ship", "ship"], ["cloud", "dog", "lake"], ["sky", "tree", "man", "boat", "cloud", "light"]),
    (["person", "lake"], ["sun", "sky"], ["people", "water", "lake", "dog", "sun", "sun", "sky"]),
    (["tree", "forest"], ["person"], ["bush", "tree", "table"]),
    (["sky"], ["sun"], []),
]
QUESTIONS = [  # type, truth, response
    ("discriminative-hallucination", "no", "No"), ("discriminative-hallucination", "no", "Yes"),
    ("discriminative-hallucination", "yes", "Yes"), ("discriminative-attribute-state", "yes", "No"),
    ("discriminative-attribute-state", "no", "No"), ("discriminative-attribute-number", "no", "No"),
    ("discriminative-attribute-number", "yes", "Yes"), ("discriminative-attribute-action", "no", "maybe"),
    ("discriminative-attribute-action", "no", "No"), ("discriminative-relation", "yes", "Yes"),
    ("relation", "no", "No"), ("relation", "no", "Yes"),
]  # fmt: skip
