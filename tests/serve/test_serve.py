"""Answers of `lsg serve` to the client of the package `openai`: they are those of `vlm.generate`, whoever else asks."""

import asyncio
import threading

import httpx
import numpy as np
import openai
import pytest
from serving import LIMITS, NAME, asked, scene, served, shown, written

from lsg_jax.data.conversation import Turn
from lsg_jax.serve.batching import padded_length, row_counts

QUESTION = "What is it?"


def test_an_answer_is_that_of_generate(tiny, gated):
    reply = tiny.ask(asked(QUESTION, scene(0)), max_tokens=16)
    assert reply.choices[0].message.content == gated.generate([scene(0)], [QUESTION], 16)[0]
    assert reply.choices[0].finish_reason == "length" and reply.model == NAME and reply.object == "chat.completion"
    prompt = len(gated.processor.encode_question(QUESTION, image_sizes=[(64, 64)]).ids)
    assert reply.usage.prompt_tokens == prompt and reply.usage.completion_tokens == 16
    assert reply.usage.total_tokens == prompt + 16
    assert tiny.text(asked(QUESTION, scene(0)), max_completion_tokens=16, temperature=0) == reply.choices[0].message.content
    assert tiny.text(asked("Hello"), max_tokens=16) == gated.generate([None], ["Hello"], 16)[0]


def test_methods(tiny, gated):
    expected = {"gates": gated, "base": gated.plain()}
    answers = {name: tiny.text(asked(QUESTION, scene(0)), max_tokens=16, lsg={"method": name}) for name in expected}
    assert answers == {name: vlm.generate([scene(0)], [QUESTION], 16)[0] for name, vlm in expected.items()}
    assert answers["gates"] != answers["base"]
    layers = gated.config.text.num_layers
    fixed = lambda pair: tiny.text(
        asked(QUESTION, scene(0)), max_tokens=16, lsg={"method": "coefficients", "coefficients": [pair] * layers}
    )
    assert fixed([1, 1]) == answers["base"] != fixed([4, 0.1])
    for wrong in ({"method": "other"}, {"method": "coefficients", "coefficients": [[1, 1]]}):
        with pytest.raises(openai.BadRequestError, match="lsg"):
            tiny.ask(asked("Hi"), lsg=wrong)


def test_several_images_and_messages(tiny, gated):
    both = [scene(0), scene(1, 80)]
    assert tiny.text(asked(QUESTION, *both), max_tokens=16) == gated.generate([both], [QUESTION], 16)[0]
    between = [{"role": "user", "content": [written("A"), shown(both[0]), written("B"), shown(both[1])]}]
    assert tiny.text(between, max_tokens=16) == gated.generate([both], ["A<image>\nB<image>"], 16)[0]

    messages = [
        {"role": "system", "content": "Be brief."},
        *asked(QUESTION, both[0]),
        {"role": "assistant", "content": "A star."},
        {"role": "user", "content": "And now?"},
    ]
    turns = [Turn("human", f"<image>\n{QUESTION}"), Turn("gpt", "A star."), Turn("human", "And now?")]
    encoded = gated.processor.encode(turns, None, system="Be brief.", image_sizes=[(64, 64)])
    batch = gated.pad_questions([encoded], [gated.processor.all_pixels([both[0]])])
    expected = gated.processor.decode(gated.generate_batch(batch, 16)[0])
    assert tiny.text(messages, max_tokens=16) == expected != tiny.text(messages[1:], max_tokens=16)


def test_streams(tiny):
    for prompt in (QUESTION, "Hello there", "x"):
        messages = asked(prompt, scene(2))
        whole = tiny.text(messages, max_tokens=40)
        pieces = tiny.stream(messages, max_tokens=40)
        assert "".join(pieces) == whole and sum(map(bool, pieces)) > 2
    parts = list(tiny.ask(messages, max_tokens=4, stream=True, stream_options={"include_usage": True}))
    assert parts[0].choices[0].delta.role == "assistant" and parts[-2].choices[0].finish_reason == "length"
    assert not parts[-1].choices and parts[-1].usage.completion_tokens == 4 and parts[-2].usage is None
    assert len({part.id for part in parts}) == 1


def test_stop(tiny):
    messages = asked(QUESTION, scene(0))
    whole = tiny.text(messages, max_tokens=40)
    stops = [whole[20:22], "never there"]
    reply = tiny.ask(messages, max_tokens=40, stop=stops)
    cut = whole[: whole.index(stops[0])].strip()
    assert reply.choices[0].message.content == cut and reply.choices[0].finish_reason == "stop"
    assert 0 < reply.usage.completion_tokens < 40
    assert "".join(tiny.stream(messages, max_tokens=40, stop=stops[0])) == cut


def test_draws_depend_on_the_seed_alone(tiny, gated):
    messages, hot = asked(QUESTION, scene(0)), {"temperature": 1.0, "top_p": 0.9, "max_tokens": 16}
    alone = {seed: tiny.text(messages, seed=seed, **hot) for seed in (1, 2, -5, 2**63 - 1)}
    assert len(set(alone.values())) == len(alone)
    requests = [(messages, hot | {"seed": seed}) for seed in alone] + [(messages, {"max_tokens": 16})]
    with served(gated, batch_size=2, waits_for=len(requests)) as found:
        assert at_once(found, requests[::-1])[::-1][: len(alone)] == list(alone.values())
        assert found.counted("lsg_batch_requests_bucket", le="1.0") == 1  # the other four in pairs
    greedy = tiny.text(messages, max_tokens=16)
    for cold in ({"top_p": 0}, {"temperature": 1e-4}, {"temperature": 1e-37}, {"temperature": 1e-300}):
        assert tiny.text(messages, **hot | cold) == greedy
    assert tiny.text(messages, **hot) != tiny.text(messages, **hot)


def at_once(tiny, requests):
    """Answers to requests that are sent together."""

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            one = lambda messages, fields: client.chat.completions.create(model=NAME, messages=messages, **fields)
            return await asyncio.gather(*(one(*request) for request in requests))

    return [reply.choices[0].message.content for reply in asyncio.run(ask_all())]


def test_two_hundred_at_once_are_answered_as_one_by_one(tiny, gated):
    prompts = [QUESTION, "Which colour has the largest of all these shapes? " * 2]
    kinds = [(prompt, images) for prompt in prompts for images in ([], [scene(0)], [scene(1, 100)])] + [
        ("Two", [scene(0), scene(1)])
    ]
    expected = [gated.generate([images or None], [prompt], 16)[0] for prompt, images in kinds]
    requests = [(asked(kinds[i % len(kinds)][0], *kinds[i % len(kinds)][1]), {"max_tokens": 16}) for i in range(200)]
    before = tiny.counted("lsg_requests_total", status="200")
    assert at_once(tiny, requests) == [expected[i % len(kinds)] for i in range(200)]
    assert tiny.counted("lsg_requests_total", status="200") == before + 200
    tiny.wait_until_idle()
    compiled = tiny.counted("lsg_compilations_total")
    at_once(tiny, requests[:60])
    shapes = {padded_length(len(gated.processor.encode_question("x " * n, image_sizes=()).ids)) for n in range(1, 40)}
    assert len(shapes) <= 4 and tiny.counted("lsg_compilations_total") <= compiled + 2 * len(row_counts(2))


def test_near_ties_are_decided_alone(gated):
    """With a margin that every choice falls below, each answer of a batch is computed again."""
    with served(gated, batch_size=2, near_tie=1e9, waits_for=4) as found:
        requests = [(asked(QUESTION, scene(i)), {"max_tokens": 16}) for i in range(4)]
        assert at_once(found, requests) == gated.generate([scene(i) for i in range(4)], [QUESTION] * 4, 16)
        assert found.counted("lsg_near_ties_total") == 4 == found.counted("lsg_batch_requests_sum") - 4


def test_a_client_that_goes_away_frees_its_place(tiny):
    """Of streams that are left, in the queue or while they are answered, nothing is computed any more."""
    body = {"model": NAME, "messages": asked(QUESTION, scene(0)), "max_tokens": 64}
    before = tiny.counted("lsg_requests_total", status="499")
    for streaming in (True, False):
        leave = threading.Event()

        async def go(streaming=streaming, leave=leave):
            async with httpx.AsyncClient(base_url=tiny.url) as client:
                tasks = [asyncio.ensure_future(client.post("/v1/chat/completions", json=body | {"stream": streaming}))
                         for _ in range(12)]  # fmt: skip
                while not tiny.counted("lsg_running_requests"):
                    await asyncio.sleep(0.001)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(go())
        tiny.wait_until_idle()
    assert tiny.counted("lsg_requests_total", status="499") > before + 12
    assert tiny.counted("lsg_waiting_requests") == 0
    assert tiny.text(asked(QUESTION, scene(0)), max_tokens=4)


def test_limits_of_tokens(tiny):
    for fields, part in (
        ({"max_tokens": LIMITS.max_new_tokens + 1}, "is the most"),
        ({"messages": asked("word " * 3000)}, "tokens"),
        ({"messages": asked("a " * 910), "max_tokens": 64}, "together"),
    ):
        with pytest.raises(openai.BadRequestError, match=part) as caught:
            tiny.ask(**{"messages": asked("Hi"), **fields})
        assert caught.value.body["param"] in ("max_tokens", "messages")
    assert tiny.ask(asked("Hi")).usage.completion_tokens == LIMITS.max_new_tokens  # as many as there may be


def test_values_that_are_not_finite_are_an_error(gated):
    broken = gated.plain()
    broken.frozen = broken.frozen | {"language_model": dict(gated.frozen["language_model"])}
    table = np.array(broken.frozen["language_model"]["embed_tokens"])
    table[:] = np.nan
    broken.frozen["language_model"]["embed_tokens"] = table
    with served(broken, batch_size=2) as found:
        with pytest.raises(openai.InternalServerError, match="NaN or infinity"):
            found.ask(asked(QUESTION, scene(0)), max_tokens=4)
        with pytest.raises(openai.APIError, match="NaN or infinity"):
            found.stream(asked(QUESTION, scene(0)), max_tokens=4)
        assert found.counted("lsg_requests_total", status="500") == 2
        assert found.counted("lsg_requests_total", status="200") == found.counted("lsg_request_seconds_count") == 0
