"""The conversations and images that `record_text_and_pixels.py` and `record_templates.py` record."""

from __future__ import annotations

import numpy as np

LONG = [
    text
    for i in range(12)
    for text in (f"Question {i}: how many things are there now, and of which colour?", f"There are {i} of them, all blue.")
]

CONVERSATIONS: list[tuple[str, bool, list[str]]] = [
    # name, with an image, human and gpt in turns
    ("one turn", True, ["<image>\nWhat colour is the ball?", "The ball is red."]),
    ("short answers", True, ["<image>\nHow many?", "3", "Is it red?\nAnswer with one word.", "Yes"]),
    ("three turns", True, ["<image>\nWhat is it?", "A cat.", "Where?", "On the mat, by the door.", "Sure?", "Yes, I am."]),
    ("no image", False, ["Who wrote Hamlet?", "William Shakespeare did.", "When?", "Around 1600."]),
    ("tag in the middle", True, ["Look at <image> and say what it shows.", "A harbour at dusk."]),
    ("tag at the end", True, ["What is in the picture?\n<image>", "Two dogs."]),
    ("tag in the second turn", True, ["Hello!", "Hi, how can I help?", "Describe <image>", "A bicycle."]),
    ("tag alone", True, ["<image>", "A blank page."]),
    (
        "accents and other scripts",
        True,
        ["<image>\nÜbersetze „naïve façade“ — 日本語で?", "素朴なファサード。 Ça va; Привет, κόσμε"],
    ),
    ("emoji", True, ["<image>\nWhich mood? 😀 or 😢?", "😀 👩‍👩‍👧‍👦 🏳️‍🌈 indeed", "And 🔴?", "🔴"]),
    ("newlines", True, ["<image>\nList them.\n\nOne a line.", "1. cup\n2. plate\n\n3. fork\n", "More?", "\nNo."]),
    ("double spaces", True, ["<image>\nRead  the   sign.", "STOP  HERE    now"]),
    ("spaces around", True, ["<image>\n  what now?  ", "  two spaces lead", " and here ", "one trails "]),
    ("tabs and code", True, ["<image>\nWrite\tit.", "def f(x):\n\treturn {x: 'a{}b' % 1}  # <b>&amp;</b>\n"]),
    ("digits and signs", True, ["<image>\n3.14 * 10^-7 = ?", "(A) $1,234.50; 50% -> 0.5 [x] \\frac{1}{2}"]),
    ("HTML", True, ["<image>\nCode?", '<html>\n<body class="a b">\n  <p>Hi</p>\n</body>\n</html>']),
    ("role words in text", True, ["<image>\nIs USER: a label?", "Yes, as is [INST] or ### Human: here."]),
    ("long", True, ["<image>\n" + LONG[0], *LONG[1:]]),
    ("end marker in a question", True, ["<image>\nWhat does </s> mean?", "It ends a sequence."]),
    ("end marker in an answer", True, ["<image>\nHow does it end?", "With </s> at the end.", "Sure?", "Yes."]),
    ("generation prompt in an answer", True, ["<image>\nHow?", "Write ASSISTANT: first.", "Why?", "So it is."]),
]

_TEMPLATE_CASES = {
    "one turn", "short answers", "no image", "tag in the middle", "tag in the second turn", "tag alone", "newlines",
    "spaces around", "tabs and code", "role words in text",
}  # fmt: skip
TEMPLATE_CONVERSATIONS = [case for case in CONVERSATIONS if case[0] in _TEMPLATE_CASES]
"""What `record_templates.py` records."""

# The chat template that the converted LLaVA-OneVision checkpoints ship, in fewer words: same text for these conversations.
ONEVISION_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ '\n' + c['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SIZES = [
    (336, 336),
    (640, 480),
    (480, 640),
    (333, 500),
    (501, 334),
    (2, 2),
    (1, 40),
    (3, 700),
    (17, 29),
    (1280, 719),
    (1000, 31),
]


def made_image(width: int, height: int) -> np.ndarray:
    """uint8 [height, width, 3]: slopes, rings and hard edges, by whole numbers alone."""
    y, x = np.mgrid[:height, :width]
    rings = ((x - width // 3) ** 2 + (y - height // 2) ** 2) // 97
    channels = (x * 5 + y * 3, rings, (x // 7 + y // 11) % 2 * 200 + (x * y) % 56)
    return np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8)
