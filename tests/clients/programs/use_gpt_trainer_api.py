"""Uses gpt-trainer-api as its README does, and says what it saw: use_gpt_trainer_api.py SCENARIO ARGUMENT…"""

import json
import os
import sys
from pathlib import Path

from gpt_trainer.base import BaseAPI

BaseAPI.BASE_URL = os.environ["PARLEY_URL"]

from gpt_trainer.api import GPTTrainerAPI  # noqa: E402 - the address is taken when a client is made

api = GPTTrainerAPI(os.environ["PARLEY_KEY"])


def say(step, value):
    print(json.dumps([step, value]), flush=True)


def refusal(call, *arguments):
    """What the library raises."""
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return None


def chatbots():
    created = api.chatbot.create_chatbot({"name": "Ferrets", "visibility": "private", "show_citations": True})
    say("created", created.to_dict())
    say("got", api.chatbot.get_chatbot(created.uuid).to_dict())
    updated = api.chatbot.update_chatbot(created.uuid, {"name": "Polecats", "rate_limit": [10, 60]})
    say("updated", updated.to_dict())
    say("listed", [chatbot.uuid for chatbot in api.chatbot.get_chatbots()])
    api.chatbot.delete_chatbot(created.uuid)
    say("gone", refusal(api.chatbot.get_chatbot, created.uuid))


def agents():
    chatbot = api.chatbot.create_chatbot({"name": "Ferrets"})
    say("first", [agent.to_dict() for agent in api.agent.get_agents(chatbot.uuid)])
    wanted = {
        "name": "Sleep",
        "type": "user-facing",
        "description": "Knows of sleep",
        "prompt": "You are a ferret.",
        "model": "goes-on",
        "temperature": 0.5,
    }
    created = api.agent.create_agent(chatbot.uuid, wanted)
    say("created", created.to_dict())
    say("got", api.agent.get_agent(created.uuid).to_dict())
    updated = api.agent.update_agent(created.uuid, {"name": "Play", "prompt": "You are a polecat."})
    say("updated", updated.to_dict())
    say("listed", [agent.name for agent in api.agent.get_agents(chatbot.uuid)])
    api.agent.delete_agent(created.uuid)
    say("gone", refusal(api.agent.get_agent, created.uuid))
    say("left", [agent.name for agent in api.agent.get_agents(chatbot.uuid)])


def sources():
    chatbot = api.chatbot.create_chatbot({"name": "Ferrets"})
    leaflet = Path("ferrets.txt")
    leaflet.write_text("Ferrets sleep for eighteen hours a day.")
    uploaded = api.data_source.upload_file(chatbot.uuid, str(leaflet))
    say("uploaded", uploaded.to_dict())
    say("uploaded again", refusal(api.data_source.upload_file, chatbot.uuid, str(leaflet)))
    asked = api.data_source.upload_qa(chatbot.uuid, "How long do ferrets sleep?", "Eighteen hours")
    say("asked", asked.to_dict())
    say("linked", api.data_source.add_url(chatbot.uuid, "https://parley.invalid/ferrets").to_dict())
    say("got", api.data_source.get_source(uploaded.uuid).to_dict())
    say("updated", api.data_source.update_source(uploaded.uuid, "On ferrets").to_dict())
    say("listed", [source.uuid for source in api.data_source.list_sources(chatbot.uuid)])
    tags(chatbot.uuid)
    api.data_source.delete_source(asked.uuid)
    api.data_source.bulk_delete_sources([uploaded.uuid])
    say("left", [source.type for source in api.data_source.list_sources(chatbot.uuid)])


def tags(chatbot_uuid):
    created = api.data_source_tag.create_tag(chatbot_uuid, "Sleep", "#112233").json()
    say("tag", created)
    say("tag updated", api.data_source_tag.update_tag(created["uuid"], "Play").json())
    say("tags", [tag["name"] for tag in api.data_source_tag.list_tags(chatbot_uuid).json()])
    say("tag deleted", api.data_source_tag.delete_tag(created["uuid"]).json())


def converse(first, second):
    chatbot = api.chatbot.create_chatbot({"name": "Ferrets"})
    session = api.session.create_session(chatbot.uuid)
    say("chatbot", chatbot.uuid)
    say("session", session.to_dict())
    say("session again", api.session.get_session(session.uuid).to_dict())
    say("sessions", [one.uuid for one in api.session.list_sessions(chatbot.uuid)])
    for query in (first, second):
        say("streamed", api.message.stream_message(session.uuid, query))
    messages = api.message.list_messages(session.uuid)
    say("messages", [message.to_dict() for message in messages])
    say("message", api.message.get_message(messages[0].uuid).to_dict())
    api.message.delete_message(messages[0].uuid)
    say("one left", [message.uuid for message in api.message.list_messages(session.uuid)])
    api.message.bulk_delete_messages([messages[1].uuid])
    say("none left", api.message.list_messages(session.uuid))


def delete(chatbot_uuid, session_uuid):
    api.session.delete_session(session_uuid)
    say("gone", refusal(api.session.get_session, session_uuid))
    say("sessions", [one.uuid for one in api.session.list_sessions(chatbot_uuid)])


def ask(query):
    """An answer in a session of its own, and what is kept of it."""
    session = api.session.create_session(api.chatbot.create_chatbot({"name": "Ferrets"}).uuid)
    say("answer", api.message.stream_message(session.uuid, query))
    say("kept", [[message.query, message.response] for message in api.message.list_messages(session.uuid)])


def cut(query):
    """An answer that the server breaks off."""
    session = api.session.create_session(api.chatbot.create_chatbot({"name": "Ferrets"}).uuid)
    try:
        say("answer", api.message.stream_message(session.uuid, query))
    except Exception as error:
        say("raised", [type(error).__name__, str(error)])
    say("kept", [[message.query, message.response] for message in api.message.list_messages(session.uuid)])


def errors(refused, poor_key):
    nowhere = "0" * 32
    session = api.session.create_session(api.chatbot.create_chatbot({"name": "Ferrets"}).uuid)
    say("unknown chatbot", refusal(api.chatbot.get_chatbot, nowhere))
    say("unknown session", refusal(api.message.stream_message, nowhere, "hello"))
    say("no id", refusal(api.session.get_session, "ferrets"))
    say("no name", refusal(api.chatbot.create_chatbot, {}))
    say("no query", refusal(api.message.stream_message, session.uuid, None))
    say("provider down", refusal(api.message.stream_message, session.uuid, refused))
    say("wrong key", refusal(GPTTrainerAPI("wrong").chatbot.get_chatbots))
    say("no key", refusal(GPTTrainerAPI("").chatbot.get_chatbots))
    poor = GPTTrainerAPI(poor_key)
    poor.chatbot.get_chatbots()
    say("over the limit", refusal(poor.message.stream_message, session.uuid, "fake?tokens=1"))


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
