"""The model card of gates: README.md with YAML front matter, as the Hugging Face Hub shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lsg_jax.config import to_dict
from lsg_jax.digest import bytes_sha256
from lsg_jax.eval.results import BASE, BenchmarkResult, Estimate
from lsg_jax.gating.portable import PortableGates
from lsg_jax.hub import GATE_FILE
from lsg_jax.sharing.made import Made
from lsg_jax.sharing.scores import Scores

TAGS = ["lsg", "attention-sinks", "layer-wise-sink-gating", "vision-language-model"]
PAPER = "https://arxiv.org/abs/2604.03316"
_SCALED = {
    "v_sink_rest": "V-sinks (sink tokens that come from the vision tower)",
    "l_sink_rest": "L-sinks (sink tokens that arise in the language model)",
    "three": "V-sinks (sink tokens that come from the vision tower) and of L-sinks (that arise in the language model)",
}
"""What each grouping tells from the other visual tokens."""

_NOT_IN_CODE = re.compile(r"[`|\\\x00-\x1f\x7f-\x9f\u2028\u2029]")


@dataclass(frozen=True)
class Shared:
    """All that a card tells.

    Attributes:
        repository: Hub id. revision: branch that it is written to; None for `main`.
        digest: sha256 of the gates, as evaluations record it.
        file: content of the gate file.
    """

    repository: str
    revision: str | None
    gates: PortableGates
    digest: str
    file: bytes
    made: Made
    scores: Scores | None

    @property
    def name(self) -> str:
        """What --gates takes for these gates."""
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"

    @property
    def model(self) -> str:
        """The model in words: its Hub id, else the name of the folder that it was in."""
        if self.made.base_model is not None:
            return _code(self.made.base_model)
        folder = self.gates.backbone.rpartition(" ")[0]
        return "a vision-language model" + (f" that was in the folder {_code(folder)}" if folder else "")

    @property
    def backbone(self) -> str:
        """Digest of the weights that the gates were trained on; empty if unknown."""
        return self.made.run.backbone if self.made.run else self.gates.backbone.rpartition(" ")[2]

    @property
    def layers(self) -> str:
        """`layer 3`, or `layers 3, 6 and 7`."""
        *first, last = map(str, self.gates.gate.layers)
        return f"layers {', '.join(first)} and {last}" if first else f"layer {last}"


def model_card(shared: Shared) -> str:
    """The whole text."""
    base = shared.made.base_model
    count = sum(leaf.size for leaf in shared.gates.parameters.values())
    several = len(shared.gates.gate.layers) > 1
    parts = [
        f"---\n{_front_matter(shared)}\n---",
        f"# Sink gates{f' for {base}' if base else ''}",
        f"{'Gates' if several else 'A gate'} of [Layer-wise Sink Gating]({PAPER}) for {shared.model}, "
        f"at decoder {shared.layers}, with {count:,} trained parameters{', made with `lsg_jax`' if shared.made.run else ''}. "
        "A gate reads the question with its image, and scales the keys "
        f"of {_SCALED[shared.gates.gate.grouping]} against those of the other visual tokens. "
        "The weights of the model stay as they are.",
        "## Use",
        *_use(shared),
        "## Scores",
        *_scores(shared),
        "## How they were made" if several else "## How it was made",
        *_made(shared),
        "## What counts as a sink",
        f"The same as a file: [`sinks.toml`](sinks.toml). `{GATE_FILE}` holds these settings too: they are applied with it.",
        _block("toml", toml_lines({"sinks": to_dict(shared.gates.sinks)})),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(shared: Shared) -> str:
    from huggingface_hub import ModelCardData

    known = shared.made.base_model is not None
    return ModelCardData(
        base_model=shared.made.base_model,
        base_model_relation="adapter" if known else None,
        library_name="lsg_jax",
        pipeline_tag="image-text-to-text",
        tags=TAGS,
    ).to_yaml()


def _use(shared: Shared) -> list[str]:
    made = shared.made
    options = {"revision": made.base_revision, "dtype": made.base_dtype}
    converted = "".join(f" --{name} {value}" for name, value in options.items() if value is not None)
    source = made.base_model or "SOURCE"
    python = [
        "import lsg_jax",
        "",
        f'vlm = lsg_jax.load("models/base", gates="{shared.name}")',
        'vlm.generate(["photo.jpg"], ["What is on the table?"])',
    ]
    revision = "" if shared.revision is None else f', revision="{shared.revision}"'
    torch = [
        "from converters.torch_gate import attach",
        "from huggingface_hub import hf_hub_download",
        "",
        f'with attach(hf_model, hf_hub_download("{shared.repository}", "{GATE_FILE}"{revision})):',
        "    hf_model.generate(**inputs)",
    ]
    shell = [
        f"lsg convert {source} models/base{converted}",
        f'lsg generate models/base --image photo.jpg --prompt "What is on the table?" --gates {shared.name}',
    ]
    unknown = "`SOURCE` is the checkpoint that the gates were trained on. Its Hub id was not known; its digest is below."
    return [
        _block("sh", shell),
        *([] if made.base_model else [unknown]),
        f"`{shared.repository}@REVISION` names a branch, a tag or a commit of this repository. In Python:",
        _block("python", python),
        "In PyTorch, on the model of transformers:",
        _block("python", torch),
    ]


# --------------------------------------------------------------------------------------------------------------------- scores


def _scores(shared: Shared) -> list[str]:
    if shared.scores is None:
        return ["With the upload no evaluation of these gates was given, so this card does not say what they change."]
    result, method = shared.scores.result, shared.scores.method
    rows, notes = [], []
    for name, found in result.benchmarks.items():
        if method not in found.methods:
            continue
        metric = found.shown(method)
        compared = method in found.change
        rows.append(
            [
                name,
                f"{metric}{' *' if metric == found.score else ''}",
                f"{found.questions:,}",
                _estimate(found.methods[BASE][metric]) if BASE in found.methods else "-",
                _estimate(found.methods[method][metric]),
                _estimate(found.change[method][metric], sign="+") if compared else "-",
                f"{found.paired_test[method].p_value:.2g}" if method in found.paired_test else "-",
            ]
        )
        notes += [f"- {name}: {note}" for note in _notes(found, metric)]
    heading = ["benchmark", "metric", "questions", "without gates", "with gates", "change", "p"]
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    digests = f"sha256 of the weights `{result.backbone[:12]}...`, of the gates `{result.trained[method][:12]}...`"
    same = f"Answered greedily on {result.devices}; {versions}; {digests}."
    if shared.backbone not in ("", result.backbone):
        same += (
            " The weights that were asked have another digest than those that the gates were trained on: "
            "they are the same model in another dtype, or another model."
        )
    text = (
        "In percent unless the benchmark says otherwise, with 95 % intervals over questions "
        "(bootstrap, or Wilson's where all answers are right or all are wrong)"
    )
    return [f"{text}; * marks an official score; p is of a paired test.", _table(heading, rows), *_listed(notes), same]


def _notes(found: BenchmarkResult, metric: str) -> list[str]:
    """What must be known to read a score."""
    said = [f"protocol `{found.protocol}`"]
    if found.partial:
        said.append(f"{found.questions:,} of {found.of:,} questions, so no official score")
    majority = found.majority.get(metric)
    if majority is not None:
        said.append(f"the most frequent answer alone scores {majority:.2f}")
    return ["; ".join([*said, *found.lacks, *([found.note] if found.note else [])])]


def _listed(notes: Sequence[str]) -> list[str]:
    return ["\n".join(notes)] if notes else []


def _estimate(at: Estimate, sign: str = "") -> str:
    number = lambda value: "-" if value is None else f"{value:{sign}.2f}"
    return f"{number(at.value)} [{number(at.low)}, {number(at.high)}]"


# ------------------------------------------------------------------------------------------------------------------- the making


def _made(shared: Shared) -> list[str]:
    gates, made = shared.gates, shared.made
    facts = [("model", shared.model)]
    if made.base_revision:
        facts.append(("its commit", f"`{made.base_revision}`"))
    facts.append(("sha256 of its weights", _code(shared.backbone) if shared.backbone else "unknown"))
    facts.append(("decoder layers", ", ".join(map(str, gates.gate.layers))))
    facts += _of_run(made)
    facts.append(("sha256 of the gates", f"`{shared.digest}`"))
    facts.append((f"sha256 of `{GATE_FILE}`", f"`{bytes_sha256(shared.file)}`"))
    if gates.origin:
        facts.append(("copied from", f"`{gates.origin}`"))
    parts = [_table(["what", "value"], facts)]
    if made.run is None:
        return [*parts, "They were uploaded from a gate file, which does not say how they were trained."]
    summary = "<details><summary>The configuration, with the names of folders instead of their paths</summary>"
    return [*parts, summary, _block("toml", toml_lines(made.config)), "</details>"]


def _of_run(made: Made) -> list[tuple[str, str]]:
    run = made.run
    if run is None:
        return []
    facts = [
        ("seed", str(run.config.get("seed"))),
        ("steps", f"{made.step:,} of {run.total_steps:,}"),
        ("sha256 of the training records", f"`{run.data}`"),
        ("devices", run.devices),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.versions.items())),
    ]
    if run.starts:
        facts.append(("begun", run.starts[0].time[:10]))
        if (git := run.starts[0].git) is not None:
            facts.append(("commit of lsg_jax", f"`{git.revision}`{', with changes' if git.dirty else ''}"))
    return facts


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(heading), "|" + "---|" * len(heading), *map(line, rows)])


def _code(name: str) -> str:
    """A name as code. A gate file of others may hold any: what would end the code or a cell of a table becomes `_`."""
    return f"`{_NOT_IN_CODE.sub('_', name)}`"


def _block(language: str, lines: Sequence[str]) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def toml_lines(tree: Mapping[str, Any]) -> list[str]:
    """Plain data as TOML: values, then tables. None is left out, as TOML has none."""
    lines = [f"{name} = {_toml(value)}" for name, value in tree.items() if value is not None and not isinstance(value, dict)]
    for name, table in tree.items():
        if isinstance(table, dict):
            lines += [*([""] if lines else []), f"[{name}]", *toml_lines(table)]
    return lines


def _toml(value: Any) -> str:
    # JSON's texts, numbers, truth values and lists are TOML's, but for DEL
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
