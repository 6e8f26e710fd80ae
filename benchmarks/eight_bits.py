"""What 8-bit weights change: logits, answers, gradients of gates, and gates of one model used on the other.

    python benchmarks/eight_bits.py OUT

On the control of docs/control.md, where gates matter: the model with planted sinks at float32, in bfloat16 and in 8 bits.
What is finished is kept; OUT may be the folder of `benchmarks/control.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import control
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import lsg_jax
from converters.convert import convert
from converters.export import export
from lsg_jax.data.conversation import IMAGE_TAG, Turn
from lsg_jax.data.drawing import draw
from lsg_jax.data.scene_questions import scene_questions
from lsg_jax.methods.method_model import assemble
from lsg_jax.model.generate import last_token
from lsg_jax.model.loss import answer_loss
from lsg_jax.vlm import VLM

QUESTIONS, GRADIENTS = 64, 16
LAYERS = list(control.PLANTED_LAYERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    out = parser.parse_args().out
    control.prepare(out)
    folders = {"float32": control.model(out)} | {dtype: converted(out, dtype) for dtype in ("bfloat16", "int8")}
    gates = {name: exported_gates(out, name, folder) for name, folder in folders.items() if name != "bfloat16"}
    numbers(folders, gates["float32"])
    print(f"\n{'accuracy, 2000 questions':28}" + "".join(f"{f'model {name}':>16}" for name in gates))
    found = {name: asked(out, name, folders[name], gates) for name in gates}
    for source in ("base", *gates):
        row = [control.accuracy(found[name][source], "base" if source == "base" else "lsg") for name in gates]
        print(f"{'no gates' if source == 'base' else f'gates of {source}':28}" + "".join(f"{value:16.2f}" for value in row))


def converted(out: Path, dtype: str) -> Path:
    """The model with planted sinks at another dtype."""
    hf, folder = out / "models" / "planted-hf", out / "models" / f"planted-{dtype}"
    if not hf.exists():
        export(control.model(out), hf)
    if not folder.exists():
        convert(hf, folder, dtype=dtype)
    return folder


def exported_gates(out: Path, name: str, folder: Path) -> Path:
    """Gates trained on a model, as a file: a run folder belongs to the model that it was trained on."""
    file = out / f"gates-{name}.safetensors"
    if not file.exists():
        control.lsg("gates", "export", control.trained(out, f"gates-{name}", LAYERS, planted=folder), file)
    return file


def asked(out: Path, name: str, folder: Path, gates: dict[str, Path]) -> dict[str, Any]:
    """Results of the model without gates, and under the gates of each model."""
    overrides = (f"gate.layers={LAYERS}", *control.GATES)
    run = lambda source: control.asked(
        out, f"{name}-with-gates-of-{source}", "scenes", "--gates", gates[source], planted=folder, overrides=overrides
    )
    found = {source: run(source) for source in gates}
    return {"base": found["float32"], **found}


def numbers(folders: dict[str, Path], gates: Path) -> None:
    """Differences of each model from that at float32, on the same questions."""
    asked = scene_questions("validation", QUESTIONS)
    images = [Image.fromarray(draw(question.scene, control.SIDE)) for question in asked]
    found: dict[str, tuple[np.ndarray, list[str], np.ndarray]] = {}
    for name, folder in folders.items():
        vlm = lsg_jax.load(folder, gates)
        batch = vlm.plain().questions([[image] for image in images], [question.prompt for question in asked])
        model = assemble(vlm.plain().graphdef, vlm.frozen)
        logits = np.asarray(model.logits(batch, rows=last_token(jnp.asarray(batch.attention_mask))[:, None])[0][:, 0])
        answers = vlm.plain().generate(images, [question.prompt for question in asked], 4)
        found[name] = logits, answers, gradient(vlm, asked[:GRADIENTS], images[:GRADIENTS])
    exact = found["float32"]
    print(f"{'against float32':15}  logits: rms (of rms)   answers the same   gradient of gates: cosine, relative difference")
    for name, (logits, answers, grad) in found.items():
        error = np.sqrt(np.mean(np.square(logits - exact[0])))
        share = np.mean([a == b for a, b in zip(answers, exact[1], strict=True)])
        cosine = grad @ exact[2] / np.linalg.norm(grad) / np.linalg.norm(exact[2])
        apart = np.linalg.norm(grad - exact[2]) / np.linalg.norm(exact[2])
        scale = np.sqrt(np.mean(np.square(exact[0])))
        print(f"{name:15}  {error:8.4f} ({error / scale:.2%}) {100 * share:16.1f} % {cosine:30.5f}, {apart:.2%}")


def gradient(vlm: VLM, asked: list[Any], images: list[Image.Image]) -> np.ndarray:
    """The gradient of the loss of all gates, flat."""
    processor = vlm.processor
    turn = lambda question: [Turn("human", f"{IMAGE_TAG}\n{question.prompt}")]
    encoded = [processor.encode(turn(q), q.answer, image_sizes=[i.size]) for q, i in zip(asked, images, strict=True)]
    length = max(len(one.ids) for one in encoded)
    batch = processor.collate(encoded, [processor.all_pixels([i]) for i in images], max_length=length, max_answer_tokens=8)
    loss = lambda trained: answer_loss(assemble(vlm.graphdef, vlm.frozen, trained), batch)[0]
    leaves = jax.tree.leaves(jax.grad(loss)(vlm.trained))
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


if __name__ == "__main__":
    main()
