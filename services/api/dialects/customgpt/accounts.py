"""The account, as CustomGPT.ai has it: a tenant is one user, who is all of one team."""

from datetime import UTC, datetime
from typing import Annotated

from pydantic import StringConstraints

from services.api.dialects import Endpoint, Incoming, Steps, asking
from services.api.dialects.bodies import Lenient
from services.api.dialects.customgpt.problems import unsupported
from services.api.dialects.customgpt.projects import runs_since
from services.api.dialects.customgpt.requests import PREFIX, made, read_fields
from services.api.dialects.customgpt.resources import OWNER, Json, success, time
from services.api.dialects.forms import FILE_BODY_MAX_BYTES
from shared.contracts.accounts import GetTenant, Tenant, TenantChanges, UpdateTenant

USER = f"{PREFIX}/user"

NO_LIMIT = 2**31 - 1
"""What stands where Parley has no limit, for this API has no other word for that."""


class ChangedUser(Lenient):
    """What POST /user takes."""

    name: Annotated[str, StringConstraints(max_length=255)] | None = None


def _user(tenant: Tenant) -> Json:
    return {
        "id": OWNER,
        "email": None,
        "name": tenant.name,
        "current_team_id": OWNER,
        "profile_photo_url": None,
        "created_at": time(tenant.created_at),
        "updated_at": time(tenant.created_at),
    }


def _get(call: Incoming) -> Steps:
    return success(_user((yield from asking(GetTenant(tenant=call.tenant))).tenant))


def _update(call: Incoming) -> Steps:
    fields = read_fields(call)
    said = fields.as_model(ChangedUser)
    if "profile_photo" in fields.files:
        return unsupported("profile_photo", call.url)
    if said.name is None:
        return (yield from _get(call))
    changes = made(TenantChanges, {}, name=said.name)
    return success(_user((yield from asking(UpdateTenant(tenant=call.tenant, changes=changes)))))


def _usage(call: Incoming) -> Steps:
    standing = yield from asking(GetTenant(tenant=call.tenant))
    queries = yield from runs_since(call, datetime.now(UTC).date().replace(day=1))
    usage: Json = {
        "max_projects_num": NO_LIMIT,
        "current_projects_num": standing.chatbots,
        "max_total_storage_credits": NO_LIMIT,
        "current_total_storage_credits": standing.sources,
        "max_queries": NO_LIMIT,
        "current_queries": queries,
    }
    return success(usage)


ENDPOINTS = (
    Endpoint("GET", USER, _get),
    # Who tenants are is the operator's business, their names included.
    Endpoint("POST", USER, _update, "bootstrap", FILE_BODY_MAX_BYTES),
    Endpoint("GET", f"{PREFIX}/limits/usage", _usage),
)
