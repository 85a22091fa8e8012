"""Chatbots as the store keeps them, over a real broker."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError
from pymongo.asynchronous.database import AsyncDatabase

from services.conversation_store.main import StoreSettings
from shared.contracts.base import Request
from shared.contracts.chatbots import (
    Chatbot,
    ChatbotChanges,
    DeleteChatbot,
    GetChatbot,
    ListChatbots,
    ListModels,
    UpdateChatbot,
)
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.store import ConversationToUse
from shared.ids import new_id
from shared.models_file import ModelSettings, ModelsFile
from shared.process import load_settings
from tests.conversation_store.conftest import Surroundings, surrounded
from tests.conversation_store.making import TENANT, create_chatbot, create_conversation, submit_turn
from tests.stack.rooms import Vhost

UUID = "01890a5d-ac96-774b-bcce-b302099a8057"

Database = AsyncDatabase[dict[str, Any]]


async def problem(around: Surroundings, request: Request[Any]) -> Problem:
    with pytest.raises(ServiceError) as refusal:
        await around.api.call(request)
    return refusal.value.problem


async def made(around: Surroundings, name: str = "Guide", **fields: Any) -> Chatbot:
    return await around.api.call(create_chatbot(name, **fields))


def get(reference: str | int, tenant: str = TENANT) -> GetChatbot:
    return GetChatbot(tenant=tenant, chatbot=str(reference))


def update(reference: str, **changes: Any) -> UpdateChatbot:
    return UpdateChatbot(tenant=TENANT, chatbot=reference, changes=ChatbotChanges(**changes))


async def test_chatbot_is_found_by_id_slug_and_number(around: Surroundings) -> None:
    full = {
        "model": "m",
        "temperature": 0.5,
        "instructions": "Be $brief.",
        "metadata": {"a.b": {"$c": 1}},
        "foreign": {"other": {"colour": "red"}},
    }
    chatbot = await made(around, "Travel Guide", **full)
    assert (chatbot.number, chatbot.slug, chatbot.name) == (1, "travel-guide", "Travel Guide")
    assert {name: getattr(chatbot, name) for name in full} == full
    for reference in (chatbot.id, chatbot.slug, chatbot.number):
        assert await around.api.call(get(reference)) == chatbot
    for reference in (new_id(), "travel", "2", "999999999999999999"):
        assert (await problem(around, get(reference))).code == "not_found"
    for reference in ("007", "9999999999999999999"):
        # What looks like a number and is none names nothing, and is not even asked for.
        with pytest.raises(ValidationError):
            get(reference)


async def test_same_creation_twice_is_one_chatbot(around: Surroundings) -> None:
    for command in (create_chatbot(slug="guide"), create_chatbot("Another")):
        assert await around.api.call(command) == await around.api.call(command)
        taken = create_chatbot("Third", chatbot_id=command.chatbot_id, tenant="other")
        assert [error.path for error in (await problem(around, taken)).errors] == ["/chatbot_id"]


async def test_slug_that_is_asked_for_and_taken_is_refused_and_one_that_is_made_gets_a_suffix(
    around: Surroundings,
) -> None:
    first = await made(around, "Guide")
    assert (await problem(around, create_chatbot("X", slug="guide"))).code == "slug_taken"
    others = await asyncio.gather(*(made(around, "Guide") for _ in range(8)))
    assert {other.slug for other in others} == {f"guide-{other.number}" for other in others}
    assert (await made(around, "Guide", tenant="other")).slug == first.slug
    long = [(await made(around, "x" * 79 + " y")).slug for _ in range(2)]
    assert long[0] == "x" * 79
    assert long[1].startswith("xxx")
    assert len(long[1]) <= 80


async def test_suffix_that_is_taken_too_is_no_obstacle(around: Surroundings) -> None:
    await made(around, "Guide")
    await made(around, "Other", slug="guide-3")
    assert (await made(around, "Guide")).slug.startswith("guide-")


@pytest.mark.parametrize(
    ("name", "slug"),
    [("2024", "chatbot-2024"), ("🙂", "chatbot"), ("東京", "東京"), (UUID, f"chatbot-{UUID}")],
)
async def test_name_that_makes_no_slug_of_its_own_gets_one(around: Surroundings, name: str, slug: str) -> None:
    chatbot = await made(around, name)
    assert chatbot.slug == slug
    assert (await around.api.call(get(slug))).id == chatbot.id


async def test_numbers_are_each_tenants_own_and_are_never_used_again(around: Surroundings) -> None:
    made_at_once = await asyncio.gather(*(made(around, tenant="crowd") for _ in range(10)))
    assert sorted(chatbot.number for chatbot in made_at_once) == list(range(1, 11))
    assert (await made(around)).number == 1
    await around.api.call(DeleteChatbot(tenant="crowd", chatbot="10"))
    assert (await made(around, tenant="crowd")).number == 11


async def test_changes_are_of_what_is_set_only(around: Surroundings) -> None:
    chatbot = await made(around, "Guide", model="m", temperature=1.0, instructions="Be brief.", metadata={"a": 1})
    renamed = await around.api.call(update("guide", name="Leader"))
    assert renamed == chatbot.model_copy(update={"name": "Leader", "updated_at": renamed.updated_at})
    assert renamed.updated_at > chatbot.updated_at
    changed = await around.api.call(update("1", slug="leader", model=None, instructions=None, metadata={}))
    assert (changed.slug, changed.model, changed.instructions, changed.metadata) == ("leader", None, None, {})
    assert changed.temperature == 1.0
    assert (await problem(around, get("guide"))).code == "not_found"
    await made(around, "Guide")
    assert (await problem(around, update("guide", slug="leader"))).code == "slug_taken"
    assert (await problem(around, update("nobody", name="x"))).code == "not_found"


async def test_dialect_changes_what_it_keeps_itself_and_nothing_of_others(around: Surroundings) -> None:
    chatbot = await made(around, foreign={"one": {"a.b": 1}, "two": {"$c": 2}})
    changed = await around.api.call(update(chatbot.slug, foreign={"two": {"d": 3}, "three": {}}))
    assert changed.foreign == {"one": {"a.b": 1}, "two": {"d": 3}, "three": {}}
    assert (await around.api.call(get(chatbot.id))).foreign == changed.foreign


async def test_change_that_others_have_forestalled_is_not_made_and_gives_the_chatbot_as_they_left_it(
    around: Surroundings,
) -> None:
    chatbot = await made(around)
    renamed = await around.api.call(update(chatbot.id, name="Leader"))
    late = update(chatbot.id, name="Late").model_copy(update={"as_of": chatbot.updated_at})
    assert await around.api.call(late) == renamed
    timely = update(chatbot.id, name="Timely").model_copy(update={"as_of": renamed.updated_at})
    assert (await around.api.call(timely)).name == "Timely"
    gone = update(new_id(), name="x").model_copy(update={"as_of": renamed.updated_at})
    assert (await problem(around, gone)).code == "not_found"


async def test_nothing_is_lost_of_what_many_add_at_once_to_what_a_dialect_keeps(around: Surroundings) -> None:
    chatbot = await made(around, foreign={"one": {"parts": []}})

    async def add(part: int) -> None:
        seen = chatbot
        while part not in (parts := cast(list[int], seen.foreign["one"]["parts"])):
            request = update(chatbot.id, foreign={"one": {"parts": [*parts, part]}})
            seen = await around.api.call(request.model_copy(update={"as_of": seen.updated_at}))

    await asyncio.gather(*map(add, range(10)))
    parts = cast(list[int], (await around.api.call(get(chatbot.id))).foreign["one"]["parts"])
    assert sorted(parts) == list(range(10))


async def test_chatbots_are_paged_in_the_order_of_their_creation(around: Surroundings) -> None:
    names = [(await made(around, f"Bot {n}")).name for n in range(7)]
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot="4"))
    seen: list[str] = []
    cursor = None
    while True:
        page = await around.api.call(ListChatbots(tenant=TENANT, limit=3, cursor=cursor))
        seen += [chatbot.name for chatbot in page.data]
        if (cursor := page.next_cursor) is None:
            break
    assert seen == names[:3] + names[4:]
    wrong = ListChatbots(tenant=TENANT, limit=3, cursor="Zm9yZ2Vk")
    assert (await problem(around, wrong)).code == "invalid_cursor"


async def test_deleted_chatbot_is_gone_and_leaves_no_text(around: Surroundings, documents: Database) -> None:
    chatbot = await made(around, "Marked name", instructions="marked words", metadata={"marked": "words"}, model="mark")
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=chatbot.slug))
    for reference in (chatbot.id, chatbot.slug, str(chatbot.number)):
        requests: tuple[Request[Any], ...] = (
            get(reference),
            update(reference, name="x"),
            DeleteChatbot(tenant=TENANT, chatbot=reference),
        )
        for request in requests:
            assert (await problem(around, request)).code == "not_found"
    assert (await around.api.call(ListChatbots(tenant=TENANT, limit=3, cursor=None))).data == ()
    refusal = await problem(around, create_conversation(chatbot_id=chatbot.id))
    assert [error.path for error in refusal.errors] == ["/chatbot_id"]
    assert "mark" not in str(await documents.chatbots.find_one({"_id": chatbot.id})).lower()
    assert (await made(around, "Marked name")).slug == chatbot.slug


async def test_no_chatbot_crosses_tenants(around: Surroundings) -> None:
    chatbot = await made(around, "Mine")
    theirs = {"tenant": "other", "chatbot": chatbot.id}
    requests: tuple[Request[Any], ...] = (
        *(get(reference, "other") for reference in (chatbot.id, chatbot.slug, chatbot.number)),
        UpdateChatbot(tenant="other", chatbot=chatbot.id, changes=ChatbotChanges(name="Theirs")),
        DeleteChatbot(**theirs),
    )
    for request in requests:
        assert (await problem(around, request)).code == "not_found"
    assert (await around.api.call(ListChatbots(tenant="other", limit=3, cursor=None))).data == ()
    assert (await problem(around, create_conversation(tenant="other", chatbot_id=chatbot.id))).code == "invalid_request"
    assert await around.api.call(get(chatbot.id)) == chatbot


async def test_model_that_the_models_file_does_not_name_is_refused_with_those_that_it_does(
    vhost: Vhost, migrated: str, tmp_path: Path
) -> None:
    (tmp_path / "models.toml").write_text("[models.large]\n[models.small]\n")
    async with surrounded(vhost, migrated, default_model=None, models_file=tmp_path / "models.toml") as around:
        chatbot = await made(around, model="small")
        requests: tuple[Request[Any], ...] = (
            create_chatbot(model="lagre"),
            update(chatbot.slug, model="lagre"),
            submit_turn(model="lagre"),
            submit_turn(model="lagre", chatbot_id=chatbot.id),
            submit_turn(model="lagre", conversation=ConversationToUse(id=(unused := new_id()))),
        )
        for request in requests:
            refusal = await problem(around, request)
            assert refusal.code == "invalid_request"
            assert [(error.path, error.message) for error in refusal.errors] == [
                ("/model", "this model is not known; there are: large, small")
            ]
        assert (await problem(around, submit_turn(conversation_id=unused))).code == "not_found", "nothing was made"
        assert (await around.api.call(update(chatbot.slug, name="Other", model="large"))).model == "large"
        assert (await around.api.call(submit_turn(model=None, chatbot_id=chatbot.id))).run.model == "large"


@pytest.mark.parametrize("models", [{}, {"*": ModelSettings()}, {"*": ModelSettings(), "large": ModelSettings()}])
def test_models_file_that_leaves_it_to_the_provider_knows_no_names(models: dict[str, ModelSettings]) -> None:
    assert ModelsFile(models).known is None


def test_default_model_must_be_one_of_the_models_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.toml"
    # The key is the workers' own, and need not be there for the store.
    path.write_text("[models.large]\nbase_url = 'http://x/'\napi_key_env = 'NO_SUCH_KEY'\n")
    monkeypatch.setenv("PARLEY_MODELS_FILE", str(path))
    monkeypatch.setenv("PARLEY_BOOTSTRAP_KEY", "x" * 16)
    monkeypatch.setenv("PARLEY_KEY_PEPPER", "x" * 16)
    assert load_settings(StoreSettings).models_file.known == frozenset({"large"})
    monkeypatch.setenv("PARLEY_DEFAULT_MODEL", "lagre")
    with pytest.raises(SystemExit):
        load_settings(StoreSettings)
    assert "PARLEY_DEFAULT_MODEL is none of those in PARLEY_MODELS_FILE" in capsys.readouterr().err


# What other APIs ask


async def test_chatbot_is_addressed_by_what_other_apis_call_parts_of_it(around: Surroundings) -> None:
    chatbot = await made(around, foreign_keys=("trainer:Agent-1", "trainer:tag_2"))
    assert chatbot.foreign_keys == ("trainer:Agent-1", "trainer:tag_2")
    for key in chatbot.foreign_keys:
        assert await around.api.call(get(key)) == chatbot
    for nobody in ("trainer:agent-1", "other:Agent-1", "trainer:Agent"):
        assert (await problem(around, get(nobody))).code == "not_found"
    renamed = await around.api.call(update("trainer:tag_2", name="Leader"))
    assert (renamed.name, renamed.foreign_keys) == ("Leader", chatbot.foreign_keys), "they stay"
    replaced = await around.api.call(update(chatbot.id, foreign_keys=("trainer:tag_2", "trainer:3")))
    assert replaced.foreign_keys == ("trainer:tag_2", "trainer:3")
    assert (await problem(around, get("trainer:Agent-1"))).code == "not_found"
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot="trainer:3"))
    assert (await problem(around, get(chatbot.id))).code == "not_found"


async def test_foreign_key_is_of_one_chatbot_of_a_tenant_until_that_lets_it_go(
    around: Surroundings, documents: Database
) -> None:
    first = await made(around, "First", foreign_keys=("a:1", "a:2"))
    second = await made(around, "Second", foreign_keys=("a:3",))
    for request in (
        create_chatbot("Third", foreign_keys=("a:9", "a:2")),
        update(second.id, foreign_keys=("a:3", "a:2"), name="Changed"),
    ):
        refusal = await problem(around, request)
        assert refusal.code == "invalid_request"
        assert [(error.path, error.message) for error in refusal.errors] == [
            ("/foreign_keys/1", "another chatbot has this key")
        ]
    assert await around.api.call(get(second.id)) == second, "nothing of a refused change is done"
    assert (await made(around, "Theirs", tenant="other", foreign_keys=("a:2",))).foreign_keys == ("a:2",)
    assert (await problem(around, get("a:1", "other"))).code == "not_found"
    await around.api.call(update(first.id, foreign_keys=()))
    assert "foreign_keys" not in (await documents.chatbots.find_one({"_id": first.id}) or {})
    assert (await around.api.call(update(second.id, foreign_keys=("a:2",)))).foreign_keys == ("a:2",)
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=second.id))
    assert (await made(around, "Again", foreign_keys=("a:2",))).foreign_keys == ("a:2",), "it was free again"


async def test_of_many_who_want_the_same_foreign_key_at_once_one_gets_it(around: Surroundings) -> None:
    async def outcome(request: Request[Chatbot]) -> str:
        try:
            return (await around.api.call(request)).id
        except ServiceError as error:
            return ", ".join(fault.path for fault in error.problem.errors)

    rivals = [create_chatbot(f"Bot {n}", foreign_keys=("a:1",)) for n in range(8)]
    outcomes = sorted(await asyncio.gather(*map(outcome, rivals)))
    assert outcomes[:7] == ["/foreign_keys/0"] * 7
    assert (await around.api.call(get("a:1"))).id == outcomes[7]
    others = [(await made(around, f"Other {n}")).id for n in range(8)]
    changes = await asyncio.gather(*(outcome(update(other, foreign_keys=("a:2",))) for other in others))
    assert sorted(changes)[:7] == ["/foreign_keys/0"] * 7
    assert (await around.api.call(get("a:2"))).id in changes


async def test_same_creation_with_foreign_keys_twice_is_one_chatbot(around: Surroundings) -> None:
    for command in (create_chatbot(foreign_keys=("a:1",)), create_chatbot("B", slug="b", foreign_keys=("a:2",))):
        assert await around.api.call(command) == await around.api.call(command)


async def test_chatbots_that_are_older_than_foreign_keys_have_none_and_any_number_of_them_may_be_there(
    around: Surroundings, documents: Database
) -> None:
    await made(around)
    [old] = await documents.chatbots.find({}).to_list(None)
    await documents.chatbots.insert_one({**old, "_id": new_id(), "slug": "older", "number": 2})
    page = await around.api.call(ListChatbots(tenant=TENANT, limit=5, cursor=None))
    assert [chatbot.foreign_keys for chatbot in page.data] == [(), ()]
    assert (await around.api.call(update("older", foreign_keys=("a:1",)))).foreign_keys == ("a:1",)


async def test_lists_of_chatbots_go_either_way_and_from_any_place_and_are_counted(around: Surroundings) -> None:
    ids = [(await made(around, f"Bot {n}")).id for n in range(7)]
    await made(around, "Theirs", tenant="other")
    await around.api.call(DeleteChatbot(tenant=TENANT, chatbot=ids.pop(3)))

    async def listed(**wanted: Any) -> tuple[list[str], str | None, int | None]:
        asked: dict[str, Any] = {"tenant": TENANT, "limit": 2, "cursor": None}
        page = await around.api.call(ListChatbots(**(asked | wanted)))
        return [chatbot.id for chatbot in page.data], page.next_cursor, page.total

    assert await listed(skip=4, count=True) == (ids[4:], None, 6)
    assert (await listed(skip=2))[::2] == (ids[2:4], None), "nobody counts who is not asked to"
    assert await listed(skip=6, count=True) == ([], None, 6)
    newest, cursor, total = await listed(order="desc", count=True)
    assert (newest, total) == ([*reversed(ids)][:2], 6)
    assert (await listed(order="desc", skip=2))[0] == [*reversed(ids)][2:4]
    assert (await listed(order="desc", cursor=cursor, count=True))[::2] == ([*reversed(ids)][2:4], 6)
    first, cursor, _ = await listed()
    assert first + (await listed(cursor=cursor))[0] == ids[:4]
    elsewhere = ListChatbots(tenant=TENANT, limit=2, cursor=cursor, order="desc")
    assert (await problem(around, elsewhere)).code == "invalid_cursor"


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ("guide", ["Travel Guide", "GUIDE 2"]),
        ("GUIDE", ["Travel Guide", "GUIDE 2"]),
        ("köln", ["Führer nach KÖLN"]),
        (".*", []),
        ("(a+", ["C (a+b)*"]),
        ("\\", []),
        ("e 2", ["GUIDE 2"]),
        (" ", ["Travel Guide", "GUIDE 2", "Führer nach KÖLN", "C (a+b)*"]),
    ],
)
async def test_chatbots_are_found_by_a_part_of_their_name(around: Surroundings, part: str, found: list[str]) -> None:
    for name in ("Travel Guide", "GUIDE 2", "Führer nach KÖLN", "C (a+b)*"):
        await made(around, name)
    await made(around, "Guide of others", tenant="other")
    page = await around.api.call(ListChatbots(tenant=TENANT, limit=1, cursor=None, name=part, count=True))
    rest = await around.api.call(ListChatbots(tenant=TENANT, limit=9, cursor=None, name=part, skip=1))
    assert [chatbot.name for chatbot in (*page.data, *rest.data)] == found
    assert page.total == len(found)


async def test_models_that_are_known_are_listed_with_the_default_one(
    vhost: Vhost, migrated: str, tmp_path: Path
) -> None:
    (tmp_path / "models.toml").write_text("[models.small]\n[models.large]\n[models.vectors]\n")
    told: dict[str, Any] = {"models_file": tmp_path / "models.toml", "embedding_model": "vectors"}
    async with surrounded(vhost, migrated, default_model="small", **told) as around:
        names = await around.api.call(ListModels(tenant=TENANT))
    assert (names.models, names.default) == (("large", "small"), "small")


async def test_models_that_the_provider_decides_on_are_not_listed(around: Surroundings) -> None:
    names = await around.api.call(ListModels(tenant=TENANT))
    assert (names.models, names.default) == ((), "default-model")
