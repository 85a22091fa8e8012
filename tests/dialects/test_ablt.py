"""aBLT's API on a real Parley: every endpoint of its contract, and every kind of refusal in its words."""

import asyncio
import hashlib
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from tests.cores.event_stream import read
from tests.dialects.making import new_chatbot, new_key
from tests.dialects.transcripts import Heard, Recorder, read_until
from tests.fakes.script import Script, expected_text
from tests.stack.services import Stack

Record = Callable[[str], Recorder]
Bot = dict[str, Any]

UNKNOWN_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
PROMPT_OR_MESSAGES = {
    "loc": ["body", "__root__"],
    "msg": 'Either "prompt" or "messages" is required',
    "type": "value_error",
}
NOT_NONE = {"msg": "none is not an allowed value", "type": "type_error.none.not_allowed"}


@pytest.fixture
def tag(request: pytest.FixtureRequest) -> str:
    """Names the test's answers; the same in every run, for it stands in golden transcripts."""
    return hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:6]


@pytest.fixture
async def bot(session: aiohttp.ClientSession, tag: str) -> Bot:
    """A chatbot whose answers are three tokens long; all but the first are held back by the test's gate."""
    model = Script(tag=tag, tokens=3, hold_after=1).model
    return await new_chatbot(session, f"Taxson {tag}", model=model, instructions="You know taxes.")


@pytest.fixture
async def quick_bot(session: aiohttp.ClientSession, tag: str) -> Bot:
    """A chatbot that answers at once."""
    return await new_chatbot(session, f"Taxson {tag}", model=Script(tag=tag, tokens=3).model)


async def ask(session: aiohttp.ClientSession, path: str, body: Any, **headers: str) -> Heard:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with session.post(path, data=raw, headers=headers) as response:
        return Heard(response.status, response.headers, await response.read())


async def chat(session: aiohttp.ClientSession, **body: Any) -> Heard:
    return await ask(session, "/v1/chat", {"stream": False, "prompt": "Explain how to pay taxes."} | body)


async def test_get_health_check(house: Stack, recorder: Record) -> None:
    said = recorder("ablt/health_check")
    await said.send("GET", "/health-check")
    await said.send("GET", "/health-check", Authorization="Bearer whatever")
    said.check()
    async with aiohttp.ClientSession(house.apis[0].url) as stranger, stranger.get("/health-check") as response:
        assert await response.json() == {"status": "ok"}
        assert response.headers["x-request-id"]


async def test_get_v1_bots(session: aiohttp.ClientSession, tag: str) -> None:
    told = {"description": "Knows taxes.", "welcome_message": "Hello!", "avatar_url": "https://example.org/a.png"}
    first = await new_chatbot(session, f"First {tag}", model="a model", metadata={**told, "color": "red"})
    second = await new_chatbot(session, f"Second {tag}", metadata={"description": 5})
    async with session.get("/v1/bots") as response:
        bots = {bot["uid"]: bot for bot in await response.json()}
    assert response.status == 200
    assert bots[first["id"]] == {
        "uid": first["id"],
        "slug": f"first-{tag}",
        "name": f"First {tag}",
        "model": "a model",
        **told,
    }
    assert bots[second["id"]] == {
        "uid": second["id"],
        "slug": f"second-{tag}",
        "name": f"Second {tag}",
        "description": "",
        "welcome_message": "",
        "model": "fake",
        "avatar_url": None,
    }


async def test_all_bots_are_listed_however_many(house: Stack, session: aiohttp.ClientSession) -> None:
    """Of a tenant of its own: more than fit on one page of the store's."""
    async with session.post("/chat/v1/tenants", json={"name": "many bots"}) as response:
        key = (await response.json())["key"]["secret"]
    async with aiohttp.ClientSession(house.apis[0].url, headers={"Authorization": f"Bearer {key}"}) as theirs:
        await asyncio.gather(*(new_chatbot(theirs, f"Bot {number}") for number in range(205)))
        async with theirs.get("/v1/bots") as listed:
            names = [bot["name"] for bot in await listed.json()]
    assert len(names) == 205
    assert set(names) == {f"Bot {number}" for number in range(205)}


async def test_post_v1_chat(house: Stack, session: aiohttp.ClientSession, bot: Bot, tag: str, recorder: Record) -> None:
    said = recorder("ablt/chat")
    gate = house.upstream.gate(tag)
    body = {"bot_slug": bot["slug"], "stream": True, "prompt": "Explain how to pay taxes."}
    async with said.stream("POST", "/v1/chat", body) as (heard, response):
        await read_until(heard, response, b"w0")
        await gate.allow(1)
        await read_until(heard, response, b"w1")
        await gate.open()
        await read_until(heard, response, b"[DONE]\n\n")
        assert not await response.read()
        assert response.headers["x-request-id"]
    messages = [
        {"role": "system", "content": "User live in Texas, US."},
        {"role": "user", "content": "Explain how to pay taxes."},
    ]
    whole = await said.send("POST", "/v1/chat", {"bot_uid": bot["id"], "stream": False, "messages": messages})
    assert whole.json() == {"content": expected_text(3, tag)}
    said.check()


async def test_messages_and_wishes_reach_the_model_after_the_bots_instructions(
    house: Stack, session: aiohttp.ClientSession, bot: Bot, tag: str
) -> None:
    await house.upstream.gate(tag).open()
    messages = [
        {"role": "system", "content": "User live in Texas, US."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "Hi!"},
    ]
    more = {"language": "French", "max_words": "50", "use_search": "off", "assumptions": {"a": 1}, "user_id": 7}
    heard = await chat(session, bot_uid=bot["id"], messages=messages, prompt="How?", **more)
    assert heard.status == 200, heard.body
    [asked] = house.upstream.requests(tag)
    assert [(one["role"], one["content"]) for one in asked.messages] == [
        ("system", "You know taxes."),
        ("system", "Answer in French. Answer in at most 50 words."),
        ("system", "User live in Texas, US."),
        ("user", "Hello"),
        ("assistant", "Hi!"),
        ("user", "How?"),
    ]


@pytest.mark.parametrize("stream", [False, 0, 0.0, "0", "off", "F", "false", "N", "no"], ids=repr)
async def test_what_was_a_boolean_to_pydantic_1_is_one(
    session: aiohttp.ClientSession, quick_bot: Bot, tag: str, stream: Any
) -> None:
    heard = await chat(session, bot_uid=quick_bot["id"], prompt=12.5, user_id=True, stream=stream)
    assert (heard.status, heard.json()) == (200, {"content": expected_text(3, tag)})


async def test_body_of_any_content_type_is_read_as_json(
    session: aiohttp.ClientSession, quick_bot: Bot, tag: str
) -> None:
    body = {"bot_uid": quick_bot["id"].upper(), "prompt": "hello", "stream": "yes", "unknown": [1]}
    for content_type in ("text/plain;charset=utf-8", "application/x-www-form-urlencoded", "application/octet-stream"):
        heard = await ask(session, "/v1/chat", body, **{"Content-Type": content_type})
        events = [event.data for event in read(heard.body)]
        assert events[0] == '{"content":""}'
        assert events[-1] == "[DONE]"
        assert "".join(json.loads(data)["content"] for data in events[:-1]) == expected_text(3, tag)


async def test_idempotency_key_gives_the_first_answer_again(
    house: Stack, session: aiohttp.ClientSession, quick_bot: Bot, tag: str
) -> None:
    body = {"bot_uid": quick_bot["id"], "prompt": "hello", "stream": False}
    key = {"Idempotency-Key": f"ablt-{tag}"}
    first = await ask(session, "/v1/chat", body, **key)
    assert (await ask(session, "/v1/chat", body, **key)).json() == first.json()
    assert len(house.upstream.requests(tag)) == 1
    other = await ask(session, "/v1/chat", {**body, "prompt": "else"}, **key)
    assert other.status == 422
    assert isinstance(other.json()["detail"], str)


async def test_post_v1_user_usage_statistics(session: aiohttp.ClientSession, quick_bot: Bot, recorder: Record) -> None:
    today = datetime.now(UTC).date()
    user_id = 730_000 + today.toordinal()
    for prompt in ("one two three", "four"):
        assert (await chat(session, bot_uid=quick_bot["id"], prompt=prompt, user_id=user_id)).status == 200

    async def statistics(**wanted: Any) -> dict[str, Any]:
        days = {"start_date": str(today - timedelta(days=2)), "end_date": str(datetime.now(UTC).date())}
        heard = await ask(session, "/v1/user/usage-statistics", days | wanted)
        assert heard.status == 200, heard.body
        told: dict[str, Any] = heard.json()
        return told

    theirs = await statistics(user_id=user_id)
    dates = [item["date"] for item in theirs["items"]]
    assert dates[:3] == [str(today - timedelta(days=days)) for days in (2, 1, 0)]
    figures = {name: sum(item[name] for item in theirs["items"]) for name in theirs["total"]}
    assert theirs["total"] == figures
    assert list(figures) == [
        "original_tokens",
        "enchancement_tokens",
        "response_tokens",
        "total_tokens",
        "original_words",
        "enchancement_words",
        "response_words",
        "total_words",
    ]
    assert figures["original_words"] == 4
    assert figures["response_words"] == 2 * 3
    assert figures["total_words"] == 10
    assert figures["response_tokens"] == 2 * 3
    assert figures["total_tokens"] == figures["original_tokens"] + 6 > 6
    everybodys = await statistics()
    assert everybodys["total"]["total_tokens"] >= figures["total_tokens"]
    assert (await statistics(user_id=-1))["total"]["original_words"] >= 4
    assert not any((await statistics(user_id=user_id + 1))["total"].values())
    assert (await statistics(start_date="2024-02-01", end_date="2024-01-31"))["items"] == []
    years = await statistics(start_date="2020-01-01", end_date="2023-12-31")
    assert len(years["items"]) == 4 * 365 + 1
    said = recorder("ablt/usage_statistics")
    days = {"start_date": "2024-02-28", "end_date": "2024-03-01"}
    await said.send("POST", "/v1/user/usage-statistics", {"user_id": user_id, **days} | {"user_id": 5})
    said.check()


@pytest.mark.parametrize(
    ("wanted", "entry"),
    [
        ({}, {"loc": ["body", "start_date"], "msg": "field required", "type": "value_error.missing"}),
        (
            {"start_date": "2024-13-01", "end_date": "2024-01-01"},
            {"loc": ["body", "start_date"], "msg": "invalid date format", "type": "value_error.date"},
        ),
        (
            {"start_date": "2024-01-01", "end_date": "1/2/2024"},
            {"loc": ["body", "end_date"], "msg": "invalid date format", "type": "value_error.date"},
        ),
        (
            {"start_date": "2024-01-01", "end_date": None},
            {"loc": ["body", "end_date"], **NOT_NONE},
        ),
        (
            {"start_date": "2024-01-01", "end_date": "2024-01-01", "user_id": "x"},
            {"loc": ["body", "user_id"], "msg": "value is not a valid integer", "type": "type_error.integer"},
        ),
        (
            {"start_date": "0001-01-01", "end_date": "9999-12-31"},
            {"loc": ["body", "end_date"], "msg": "at most 3660 days at a time", "type": "value_error"},
        ),
    ],
)
async def test_bad_question_for_statistics_is_422(
    session: aiohttp.ClientSession, wanted: dict[str, Any], entry: dict[str, Any]
) -> None:
    heard = await ask(session, "/v1/user/usage-statistics", wanted)
    assert heard.status == 422
    assert heard.json()["detail"][0] == entry


FAULTS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "stream is absent": (
        {"bot_slug": "a", "prompt": "b"},
        [{"loc": ["body", "stream"], "msg": "field required", "type": "value_error.missing"}],
    ),
    "stream is null": (
        {"bot_slug": "a", "prompt": "b", "stream": None},
        [{"loc": ["body", "stream"], **NOT_NONE}],
    ),
    "stream is no bool": (
        {"bot_slug": "a", "prompt": "b", "stream": "perhaps"},
        [{"loc": ["body", "stream"], "msg": "value could not be parsed to a boolean", "type": "type_error.bool"}],
    ),
    "use_search is no bool": (
        {"bot_slug": "a", "prompt": "b", "stream": False, "use_search": {"a": 1}},
        [{"loc": ["body", "use_search"], "msg": "value could not be parsed to a boolean", "type": "type_error.bool"}],
    ),
    "neither prompt nor messages": ({"bot_slug": "a", "stream": True}, [PROMPT_OR_MESSAGES]),
    "nothing in prompt and messages": (
        {"bot_slug": "a", "stream": True, "prompt": "", "messages": []},
        [PROMPT_OR_MESSAGES],
    ),
    "prompt is an object": (
        {"bot_slug": "a", "stream": True, "prompt": {"a": 1}},
        [{"loc": ["body", "prompt"], "msg": "str type expected", "type": "type_error.str"}, PROMPT_OR_MESSAGES],
    ),
    "prompt is an array": (
        {"bot_slug": "a", "stream": True, "prompt": ["a"]},
        [{"loc": ["body", "prompt"], "msg": "str type expected", "type": "type_error.str"}, PROMPT_OR_MESSAGES],
    ),
    "messages is no list": (
        {"bot_slug": "a", "stream": True, "messages": "hello"},
        [
            {"loc": ["body", "messages"], "msg": "value is not a valid list", "type": "type_error.list"},
            PROMPT_OR_MESSAGES,
        ],
    ),
    "message is no object": (
        {"bot_slug": "a", "stream": True, "messages": ["hello", 5]},
        [
            {"loc": ["body", "messages", 0], "msg": "value is not a valid dict", "type": "type_error.dict"},
            {"loc": ["body", "messages", 1], "msg": "value is not a valid dict", "type": "type_error.dict"},
            PROMPT_OR_MESSAGES,
        ],
    ),
    "message is null": (
        {"bot_slug": "a", "stream": True, "messages": [None]},
        [{"loc": ["body", "messages", 0], **NOT_NONE}, PROMPT_OR_MESSAGES],
    ),
    "content is absent": (
        {"bot_slug": "a", "stream": True, "messages": [{"role": "user"}]},
        [
            {"loc": ["body", "messages", 0, "content"], "msg": "field required", "type": "value_error.missing"},
            PROMPT_OR_MESSAGES,
        ],
    ),
    "role is not allowed": (
        {"bot_slug": "a", "stream": True, "prompt": "b", "messages": [{"role": "tool", "content": "c"}]},
        [
            {
                "loc": ["body", "messages", 0, "role"],
                "msg": "value is not a valid enumeration member; permitted: 'system', 'user', 'assistant'",
                "type": "type_error.enum",
            }
        ],
    ),
    "neither bot_uid nor bot_slug": (
        {"stream": True, "prompt": "b"},
        [
            {
                "loc": ["body", "__root__"],
                "msg": 'Either "bot_uid" or "bot_slug" is required',
                "type": "value_error",
            }
        ],
    ),
    "everything": (
        {"bot_slug": [], "prompt": {}},
        [
            {"loc": ["body", "bot_slug"], "msg": "str type expected", "type": "type_error.str"},
            {"loc": ["body", "prompt"], "msg": "str type expected", "type": "type_error.str"},
            {"loc": ["body", "stream"], "msg": "field required", "type": "value_error.missing"},
            {
                "loc": ["body", "__root__"],
                "msg": 'Either "bot_uid" or "bot_slug" is required',
                "type": "value_error",
            },
            PROMPT_OR_MESSAGES,
        ],
    ),
    "the last message is the bot's": (
        {"bot_slug": "a", "stream": True, "messages": [{"role": "assistant", "content": "c"}]},
        [{"loc": ["body", "messages", 0, "role"], "msg": "must be user at the end", "type": "value_error"}],
    ),
    "the last message is blank": (
        {"bot_slug": "a", "stream": True, "messages": [{"role": "user", "content": " \n"}]},
        [{"loc": ["body", "messages", 0, "content"], "msg": "must not be empty", "type": "value_error"}],
    ),
    "prompt is blank": (
        {"bot_slug": "a", "stream": True, "prompt": " \n"},
        [{"loc": ["body", "prompt"], "msg": "must not be empty", "type": "value_error"}],
    ),
    "content is too long": (
        {"bot_slug": "a", "stream": True, "prompt": "x" * 100_001},
        [
            {
                "loc": ["body", "prompt"],
                "msg": "ensure this value has at most 100000 characters",
                "type": "value_error.any_str.max_length",
            },
            PROMPT_OR_MESSAGES,
        ],
    ),
    "max_words is none": (
        {"bot_slug": "a", "stream": True, "prompt": "x", "max_words": 0},
        [
            {
                "loc": ["body", "max_words"],
                "msg": "ensure this value is greater than or equal to 1",
                "type": "value_error.number.not_ge",
            }
        ],
    ),
    "content is no Unicode": (
        {"bot_slug": "a", "stream": True, "messages": [{"role": "user", "content": "\ud800"}]},
        [
            {
                "loc": ["body", "messages", 0, "content"],
                "msg": "contains a lone surrogate, which is not valid Unicode",
                "type": "value_error",
            }
        ],
    ),
    "no JSON": (
        b'{"stream": tru}',
        [
            {
                "loc": ["body", 11],
                "msg": "Expecting value: line 1 column 12 (char 11)",
                "type": "value_error.jsondecode",
            }
        ],
    ),
    "no object": (b"[1]", [{"loc": ["body"], "msg": "value is not a valid dict", "type": "type_error.dict"}]),
    "nothing": (b"", [{"loc": ["body"], "msg": "field required", "type": "value_error.missing"}]),
}


@pytest.mark.parametrize(("body", "entries"), FAULTS.values(), ids=FAULTS.keys())
async def test_fault_in_a_chat_is_told_as_pydantic_1_told_it(
    session: aiohttp.ClientSession, body: Any, entries: list[dict[str, Any]]
) -> None:
    heard = await ask(session, "/v1/chat", body)
    assert (heard.status, heard.json()) == (422, {"detail": entries})


async def test_bot_that_is_not_there_is_404_after_the_bodys_faults(
    session: aiohttp.ClientSession, quick_bot: Bot
) -> None:
    unknown: list[dict[str, Any]] = [
        {"bot_slug": "nobody"},
        {"bot_slug": quick_bot["number"]},
        {"bot_slug": quick_bot["id"]},
        {"bot_slug": "No Slug!"},
        {"bot_uid": UNKNOWN_ID},
        {"bot_uid": quick_bot["slug"]},
        {"bot_uid": 5},
    ]
    for names in unknown:
        heard = await chat(session, **names)
        assert (heard.status, heard.json()) == (404, {"detail": "Bot not found"}), names
        assert (await chat(session, **names, prompt=[])).status == 422


async def test_every_kind_of_refusal(
    house: Stack, session: aiohttp.ClientSession, bot: Bot, tag: str, recorder: Record
) -> None:
    said = recorder("ablt/refusals")
    body = {"bot_uid": bot["id"], "stream": False, "prompt": "hello"}
    async with aiohttp.ClientSession(house.apis[0].url) as stranger:
        said.session = stranger
        await said.send("GET", "/v1/bots")
        await said.send("GET", "/v1/bots", Authorization="Bearer wrong")
        await said.send("POST", "/v1/chat", body)
    said.session = session
    await said.send("POST", "/v1/chat", b"{")
    await said.send("POST", "/v1/chat", {"prompt": "hello"})
    await said.send("POST", "/v1/chat", {**body, "stream": [], "user_id": "\n"})
    await said.send("POST", "/v1/chat", {**body, "bot_uid": "nobody"})
    await said.send("POST", "/v1/chat", body, Idempotency_Key="x" * 201)
    await said.send("GET", "/v1/chat")
    await said.send("GET", "/v1/bots/1")
    await said.send("GET", "/v1/user/me")
    said.check()
    async with session.post("/v1/chat", data=io.BytesIO(b" " * (2 * 1024 * 1024 + 1))) as too_large:
        assert (too_large.status, list(await too_large.json())) == (413, ["detail"])


async def test_more_than_a_key_may_ask_for_is_429(
    house: Stack, session: aiohttp.ClientSession, bot: Bot, tag: str
) -> None:
    limited = await new_key(session, limits={"active_runs": 1})
    key = {"Authorization": f"Bearer {limited['secret']}"}
    body = {"bot_uid": bot["id"], "stream": True, "prompt": "hello"}
    async with session.post("/v1/chat", json=body, headers=key) as response:
        heard = Heard(response.status, response.headers)
        await read_until(heard, response, b"w0")
        refused = await ask(session, "/v1/chat", body, **key)
        assert (refused.status, list(refused.json())) == (429, ["detail"])
        assert int(refused.headers["Retry-After"]) >= 1
        await house.upstream.gate(tag).open()
        await read_until(heard, response, b"[DONE]\n\n")


@pytest.mark.parametrize("stream", [False, True])
async def test_provider_that_fails_before_the_first_word_is_an_error(
    session: aiohttp.ClientSession, tag: str, stream: bool
) -> None:
    bot = await new_chatbot(session, f"Failing {tag}", model=Script(tag=tag, status=401).model)
    heard = await chat(session, bot_uid=bot["id"], stream=stream)
    assert heard.status == 502
    assert list(heard.json()) == ["detail"]
    assert heard.json()["detail"]


async def test_provider_that_fails_later_ends_the_stream_without_done(session: aiohttp.ClientSession, tag: str) -> None:
    bot = await new_chatbot(session, f"Failing {tag}", model=Script(tag=tag, tokens=5, error_after=2).model)
    heard = await chat(session, bot_uid=bot["id"], stream=True)
    events = [json.loads(event.data) for event in read(heard.body, to_its_end=True)]
    assert heard.status == 200
    assert "".join(event["content"] for event in events[:-1]) == expected_text(2, tag)
    assert list(events[-1]) == ["detail"]
    whole = await chat(session, bot_uid=bot["id"])
    assert (whole.status, list(whole.json())) == (502, ["detail"])


@pytest.mark.parametrize("name", ["9" * 20, "9" * 150, "²", "١"])
async def test_place_of_a_fault_may_be_named_like_a_number(session: aiohttp.ClientSession, name: str) -> None:
    refusal = await ask(session, "/v1/chat", f'{{"messages": {{"{name}": "\\ud800"}}}}'.encode())
    assert refusal.status == 422
    assert json.loads(refusal.body)["detail"][0]["loc"] == ["body", "messages", name]
