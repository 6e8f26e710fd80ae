"""Answers by script in place of a model's own, for studies whose numbers have to be known."""

from lsg_jax.eval.answering import Answer


def script_answers(monkeypatch, right, method_of):
    """Lets every model answer `right` to its first questions and `wrong` to the others.

    Args:
        right: method -> number of right answers; read when a model answers.
        method_of: VLM -> method, judged by what the model really has.
    """

    def answer_all(models, items, prompts, config, *, max_new_tokens, known, on_batch):
        found = {name: dict(known[name]) for name in models}
        for name, vlm in models.items():
            count = right[method_of(vlm)]
            for start in range(0, len(items), config.batch_size):
                batch = range(start, start + config.batch_size)
                new = {i: Answer("right" if i < count else "wrong") for i in batch if i not in found[name]}
                found[name] |= new
                if new:
                    on_batch(name, new)
        return {name: [of[i] for i in range(len(items))] for name, of in found.items()}

    monkeypatch.setattr("lsg_jax.eval.runner.answer_all", answer_all)
