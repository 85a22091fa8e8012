"""Uses customgpt-client as its README does, and says what it saw: use_customgpt_client.py SCENARIO ARGUMENT…"""

import json
import os
import sys
from io import BytesIO

from customgpt_client import CustomGPT
from customgpt_client.types import File

CustomGPT.base_url = os.environ["PARLEY_URL"]
CustomGPT.api_key = os.environ["PARLEY_KEY"]


def say(step, value):
    print(json.dumps([step, value], default=str), flush=True)


def seen(response, *names):
    """The status, and what the library has parsed of the answer's data."""
    data = response.parsed.data if response.parsed else None
    return {"status": int(response.status_code), **{name: getattr(data, name) for name in names}}


def projects():
    leaflet = File(payload=BytesIO(b"Ferrets sleep for eighteen hours a day."), file_name="ferrets.txt")
    created = CustomGPT.Project.create(project_name="Ferrets", file=leaflet)
    say("created", seen(created, "project_name", "type", "created_at", "is_shared", "user_id", "team_id"))
    project_id = created.parsed.data.id
    say("id", project_id)
    say("got", seen(CustomGPT.Project.get(project_id=project_id), "id", "project_name"))
    updated = CustomGPT.Project.update(project_id=project_id, project_name="Polecats", is_shared=True)
    say("updated", seen(updated, "project_name", "is_shared"))
    listed = CustomGPT.Project.list(name="Polecats").parsed.data
    say("listed", {"total": listed.total, "page": listed.current_page, "ids": [one.id for one in listed.data]})
    say("stats", seen(CustomGPT.Project.stats(project_id=project_id), "pages_found", "total_queries"))
    replica = CustomGPT.Project.replicate(project_id=project_id)
    say("replicated", seen(replica, "project_name"))
    say("replica deleted", seen(CustomGPT.Project.delete(project_id=replica.parsed.data.id), "deleted"))
    settings = CustomGPT.ProjectSettings.update(
        project_id=project_id,
        default_prompt="Ask about ferrets",
        example_questions=["How long do they sleep?"],
        persona_instructions="You are a ferret.",
    )
    say("settings updated", seen(settings, "updated"))
    settings = CustomGPT.ProjectSettings.get(project_id=project_id)
    say("settings", seen(settings, "default_prompt", "persona_instructions", "chatbot_model"))
    say("limits", seen(CustomGPT.Limit.get(), "max_projects_num", "current_projects_num", "max_queries"))
    say("user", seen(CustomGPT.User.get(), "id", "name", "email"))
    say("deleted", seen(CustomGPT.Project.delete(project_id=project_id), "deleted"))
    say("gone", refusal(CustomGPT.Project.get(project_id=project_id)))


def sources():
    project_id = CustomGPT.Project.create(project_name="Ferrets").parsed.data.id
    leaflet = File(payload=BytesIO(b"Ferrets sleep for eighteen hours a day."), file_name="ferrets.txt")
    created = CustomGPT.Source.create(project_id=project_id, file=leaflet)
    say("created", seen(created, "id", "type", "created_at"))
    listed = CustomGPT.Source.list(project_id=project_id).parsed.data
    say("listed", {"sitemaps": len(listed.sitemaps), "uploads": [page.filename for page in listed.uploads.pages]})
    pages = CustomGPT.Page.get(project_id=project_id).parsed.data
    say("pages", [[page.filename, page.is_file, page.index_status] for page in pages.pages.data])
    page_id = pages.pages.data[0].id
    say("metadata", seen(CustomGPT.PageMetadata.get(project_id=project_id, page_id=page_id), "id", "title"))
    changed = CustomGPT.PageMetadata.update(project_id=project_id, page_id=page_id, title="On ferrets")
    say("metadata updated", seen(changed, "title"))
    say("page deleted", seen(CustomGPT.Page.delete(project_id=project_id, page_id=page_id), "deleted"))
    say("pages left", CustomGPT.Page.get(project_id=project_id).parsed.data.pages.total)
    CustomGPT.Project.delete(project_id=project_id)


def converse(project_id, first, second):
    created = CustomGPT.Conversation.create(project_id=project_id, name="On ferrets")
    say("created", seen(created, "name", "session_id", "project_id", "created_at"))
    session_id = created.parsed.data.session_id
    sent = CustomGPT.Conversation.send(project_id=project_id, session_id=session_id, prompt=first)
    say("sent", seen(sent, "id", "user_query", "openai_response", "citations", "conversation_id"))
    stream(project_id, session_id, second)
    messages = CustomGPT.Conversation.messages(project_id=project_id, session_id=session_id, order="asc").parsed.data
    say("conversation", {"name": messages.conversation.name, "session_id": messages.conversation.session_id})
    say("messages", [[one.id, one.user_query, one.openai_response] for one in messages.messages.data])
    newest = CustomGPT.Conversation.messages(project_id=project_id, session_id=session_id).parsed.data.messages
    say("newest first", [one.id for one in newest.data])
    renamed = CustomGPT.Conversation.update(project_id=project_id, session_id=session_id, name="On polecats")
    say("renamed", seen(renamed, "name", "session_id"))
    listed = CustomGPT.Conversation.get(project_id=project_id, name="On polecats").parsed.data
    say("listed", [[one.name, one.session_id] for one in listed.data])


def delete(project_id, session_id):
    say("deleted", seen(CustomGPT.Conversation.delete(project_id=project_id, session_id=session_id), "deleted"))
    say("gone", refusal(CustomGPT.Conversation.messages(project_id=project_id, session_id=session_id)))


def pages(project_id):
    for number in range(12):
        CustomGPT.Conversation.create(project_id=project_id, name=f"Number {number}")
    for page in (1, 2, 3):
        found = CustomGPT.Conversation.get(project_id=project_id, page=page, order="asc").parsed.data
        say(
            "conversations",
            {"names": [one.name for one in found.data], "last_page": found.last_page, "total": found.total},
        )
    session_id = CustomGPT.Conversation.create(project_id=project_id, name="A long one").parsed.data.session_id
    for _ in range(21):
        CustomGPT.Conversation.send(project_id=project_id, session_id=session_id, prompt="fake?tokens=1")
    for page in (1, 2):
        found = CustomGPT.Conversation.messages(project_id=project_id, session_id=session_id, page=page)
        messages = found.parsed.data.messages
        next_page = messages.next_page_url and messages.next_page_url.partition("/api/")[2]
        say("messages", [len(messages.data), messages.from_, messages.to, messages.last_page, next_page])
    say("path", f"v1/projects/{project_id}/conversations/{session_id}/messages")


def stream(project_id, session_id, prompt):
    client = CustomGPT.Conversation.send(project_id=project_id, session_id=session_id, prompt=prompt, stream=True)
    for event in client.events():
        data = json.loads(event.data)
        say("event", [event.event, data["status"]])
        if data["status"] == "progress":
            say("piece", data["message"])
        else:
            say(data["status"], data)


def ask(project_id, prompt):
    """A streamed answer in a conversation of its own."""
    session_id = CustomGPT.Conversation.create(project_id=project_id, name="A question").parsed.data.session_id
    say("session", session_id)
    stream(project_id, session_id, prompt)


def refusal(response):
    """The status, and what the library has parsed of the error."""
    data = response.parsed.data if response.parsed else None
    return {"status": int(response.status_code), **{name: getattr(data, name, None) for name in ("code", "message")}}


def errors(project_id, refused, poor_key):
    session_id = CustomGPT.Conversation.create(project_id=project_id, name="Trouble").parsed.data.session_id
    known = {"project_id": project_id, "session_id": session_id}
    nowhere = "00000000-0000-4000-8000-000000000000"
    say("unknown project", refusal(CustomGPT.Project.get(project_id=987654321)))
    say("no number", refusal(CustomGPT.Project.get(project_id="ferrets")))
    say("unknown session", refusal(CustomGPT.Conversation.messages(project_id=project_id, session_id=nowhere)))
    say("no prompt", refusal(CustomGPT.Conversation.send(**known)))
    say("no name", refusal(CustomGPT.Project.create()))
    say("provider down", refusal(CustomGPT.Conversation.send(**known, prompt=refused)))
    events = CustomGPT.Conversation.send(**known, prompt=refused, stream=True).events()
    say("provider down, streamed", [event.data for event in events])
    CustomGPT.api_key = "wrong"
    say("wrong key", refusal(CustomGPT.Project.list()))
    CustomGPT.api_key = ""
    say("no key", refusal(CustomGPT.Project.list()))
    CustomGPT.api_key = poor_key
    limited = [CustomGPT.Conversation.send(**known, prompt="fake?tokens=1") for _ in range(2)][-1]
    say("over the limit", {**refusal(limited), "retry_after": limited.headers.get("Retry-After")})


if __name__ == "__main__":
    scenario, *arguments = sys.argv[1:]
    globals()[scenario](*arguments)
