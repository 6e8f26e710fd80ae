"""lsg_jax as a model of lmms-eval: `python -m lmms_eval --model lsg_jax --model_args model=FOLDER,gates=G --tasks ...`.

lmms-eval provides prompts, images and scores; the answers come from the same function as those of `lsg eval`. Decoding is
greedy, and a question's images are read from its data set shortly before its batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.model import lmms
from tqdm import tqdm

from lsg_jax.config import EvalConfig, from_dict
from lsg_jax.errors import ConfigError
from lsg_jax.eval.answering import answer
from lsg_jax.eval.likelihood import log_likelihoods
from lsg_jax.eval.lmms.requests import Asked, ask, cut
from lsg_jax.opening import load_backbone, model_mesh, open_trained


class LsgJax(lmms):
    """A model folder, with gates if given.

    Args:
        model: folder written by `lsg convert`.
        gates: run folder of `lsg train` or portable gate file.
        batch_size: questions at a time on each device; lmms-eval passes its own `--batch_size`.
        dtype: of the weights; None keeps them as stored.
        template, image_aspect, max_length: as in `[eval]` of a configuration.

    Raises:
        ConfigError: an argument is unknown or of the wrong kind, or lmms-eval runs as several processes.
    """

    is_simple = True

    def __init__(
        self, model: str, gates: str | None = None, batch_size: int | str = 1, dtype: str | None = None, **settings: Any
    ) -> None:
        super().__init__()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError("lsg_jax spreads its batches over all devices itself: start lmms-eval as one plain process")
        if not str(batch_size).isdecimal():
            raise ConfigError(f"--batch_size {batch_size}: give a number")
        if unknown := sorted(settings.keys() - {"template", "image_aspect", "max_length"}):
            known = "model, gates, batch_size, dtype, template, image_aspect, max_length"
            raise ConfigError(f"--model_args: unknown argument {unknown[0]}; known: {known}")
        self.settings = from_dict(EvalConfig, {**settings, "batch_size": int(batch_size)}, where="--model_args")
        vlm = load_backbone(model, dtype=dtype, mesh=model_mesh(model, dtype=dtype))
        self.vlm = vlm if gates is None else open_trained(vlm, gates)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Greedy answers, each cut at the first stop string of the task.

        Raises:
            InputError: a task asks for sampling or beams, an input is no image, or a context has tags, but not one for each
                of several images.
        """
        asked = []
        for context, decoding, to_visual, document, task, split in (request.args for request in requests):
            where = f"{task}/{split}/{document}"
            asked.append(ask(where, context, self._visuals(to_visual, document, task, split), decoding))
        return self._answer(asked)

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds. After each round the task returns the next question and images, or ends.

        The model sees the text of the current round only; a task that needs earlier questions or answers writes them into it.
        Raises as `generate_until` does.
        """
        talks = [Talk(request.args, outputs=[]) for request in requests]
        asked = {}
        for i, talk in enumerate(talks):
            visuals = self._visuals(talk.to_visual, talk.document, talk.task, talk.split)
            asked[i] = ask(talk.where, talk.context, visuals, talk.decoding)
        while asked:
            for i, output in zip(asked, self._answer(list(asked.values())), strict=True):
                talks[i].outputs.append(output)
            asked = {i: question for i in asked if (question := self._next_round(talks[i])) is not None}
        return [talk.outputs for talk in talks]

    def _next_round(self, talk: Talk) -> Asked | None:
        talk.rounds += 1
        visuals, context, ended, talk.outputs, talk.info = talk.to_text(
            self.task_dict[talk.task][talk.split][talk.document],
            previous_output=talk.outputs,
            round_idx=talk.rounds,
            previous_round_info=talk.info,
        )
        talk.outputs = list(talk.outputs)
        return None if ended else ask(f"{talk.where}, round {talk.rounds}", context, lambda: visuals, talk.decoding)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log probability in nats of each continuation, and whether greedy decoding would give it.

        See `lsg_jax.eval.likelihood`. Raises InputError as `generate_until` does.
        """
        asked, continuations = [], []
        for context, continuation, to_visual, document, task, split in (request.args for request in requests):
            where = f"{task}/{split}/{document}"
            asked.append(ask(where, context, self._visuals(to_visual, document, task, split), {}))
            is_text = isinstance(continuation, str)
            continuations.append(continuation if is_text else continuation(self.task_dict[task][split][document]))
        return log_likelihoods(self.vlm, [q.item for q in asked], [q.text for q in asked], continuations, self.settings)

    def _visuals(self, to_visual: Callable[[Any], Any], document: int, task: str, split: str) -> Callable[[], Any]:
        return lambda: to_visual(self.task_dict[task][split][document])

    def _answer(self, asked: Sequence[Asked]) -> list[str]:
        """Calls `answer` once for each limit of new tokens."""
        outputs: dict[int, str] = {}
        with tqdm(total=len(asked), desc="lsg_jax") as bar:
            for limit in sorted({question.max_new_tokens for question in asked}):
                chosen = [i for i, question in enumerate(asked) if question.max_new_tokens == limit]
                answers = answer(
                    self.vlm,
                    [asked[i].item for i in chosen],
                    [asked[i].text for i in chosen],
                    self.settings,
                    max_new_tokens=limit,
                    on_batch=lambda new: bar.update(len(new)),
                )
                outputs |= {i: found.text for i, found in zip(chosen, answers, strict=True)}
        return [cut(outputs[i], question.until) for i, question in enumerate(asked)]


class Talk:
    """A question of several rounds: the request, the outputs so far, and the state that the task keeps between rounds."""

    def __init__(self, args: tuple, outputs: list[str]):
        self.context, self.decoding, self.to_visual, self.to_text, self.document, self.task, self.split = args
        self.where = f"{self.task}/{self.split}/{self.document}"
        self.outputs = outputs
        self.rounds = 0
        self.info: Any = None
