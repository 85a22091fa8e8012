"""What Chatzuri's API has besides, and Parley does not offer: icons, teams, and chats that the server remembers."""

from services.api.dialects import Answer, Endpoint, Incoming
from services.api.dialects.chatzuri.resources import PREFIX, answer


def _not_offered(call: Incoming) -> Answer:
    return answer({"message": "Icons, teams and chats by agent are not offered here."}, 501)


ENDPOINTS = (
    Endpoint("POST", f"{PREFIX}/upload-agent-icon", _not_offered),
    Endpoint("POST", f"{PREFIX}/create-team", _not_offered),
    Endpoint("GET", f"{PREFIX}/get-teams", _not_offered),
    Endpoint("PUT", f"{PREFIX}/update-team", _not_offered),
    Endpoint("DELETE", f"{PREFIX}/delete-team", _not_offered),
    Endpoint("POST", f"{PREFIX}/agents/{{id}}/chat", _not_offered),
)
