"""Tenants, their keys, limits and usage: the resources that clients see, and what is asked of the store about them."""

from datetime import date
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from shared.contracts.base import Changes, Contract, Cursor, EndUser, Id, Request, TenantId, Time
from shared.contracts.resources import Scope
from shared.contracts.store import Done, PageLimit

NAME_MAX_CHARACTERS = 200
LOGINS_MAX = 100
LIMIT_MAX = 10**12
USAGE_DAYS_MAX = 366
SUBJECTS_MAX = 1_000


def _is_name(name: str) -> str:
    if not name.strip():
        raise ValueError("must not be empty")
    if not name.isprintable():
        raise ValueError("must not contain control characters")
    return name


AccountName = Annotated[str, StringConstraints(max_length=NAME_MAX_CHARACTERS), AfterValidator(_is_name)]
Login = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.@:-]{1,128}$")]
"""A login at the broker."""
Logins = Annotated[tuple[Login, ...], Field(max_length=LOGINS_MAX, strict=False)]
KeyPrefix = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,80}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 of a key as its holder sends it, in hex: the key itself never crosses the broker."""
Limit = Annotated[int, Field(ge=1, le=LIMIT_MAX)] | None
"""The most that may be; None: as much as anybody likes."""


class Limits(Changes):
    """How much a tenant, or a key, may ask for. One that is not set is decided elsewhere; None is no limit.

    active_runs: runs that have been accepted and have not ended, those that wait among them. tokens_per_day: of input
    and output together, of the runs that ended on the present day in UTC.
    """

    requests_per_minute: Limit = None
    active_runs: Limit = None
    tokens_per_day: Limit = None


class Tenant(Contract):
    """The owner of keys, chatbots and conversations. `logins` may act for it over AMQP."""

    id: TenantId
    name: str
    logins: Logins
    limits: Limits
    created_at: Time


class TenantPage(Contract):
    """Tenants in the order of their creation."""

    data: Annotated[tuple[Tenant, ...], Field(strict=False)]
    next_cursor: Cursor | None


class ApiKey(Contract):
    """What opens a tenant. Of its secret only `prefix` is shown, by which a holder recognizes it."""

    id: Id
    name: str
    scope: Scope
    prefix: str
    limits: Limits
    created_at: Time
    last_used_at: Time | None
    """To the minute."""
    revoked_at: Time | None


class ApiKeyPage(Contract):
    """Keys in the order of their creation, those that were revoked among them."""

    data: Annotated[tuple[ApiKey, ...], Field(strict=False)]
    next_cursor: Cursor | None


class NewKey(Contract):
    """A key that is to be made. Whoever makes it keeps the secret; the store gets its digest."""

    id: Id
    name: AccountName
    scope: Scope
    prefix: KeyPrefix
    digest: Digest
    limits: Limits = Field(default_factory=Limits)


class TenantCreated(Contract):
    """A new tenant and its first key."""

    tenant: Tenant
    key: ApiKey


class CreateTenant(Request[TenantCreated]):
    """Make a tenant with its first admin key. What `limits` leaves out is the settings' default."""

    tenant: TenantId
    name: AccountName
    logins: Logins = ()
    limits: Limits = Field(default_factory=Limits)
    key: NewKey


class ListTenants(Request[TenantPage]):
    """Tenants in the order of their creation."""

    limit: PageLimit
    cursor: Cursor | None


class TenantStanding(Contract):
    """A tenant, and how much it has and has asked for."""

    tenant: Tenant
    chatbots: int
    sources: int
    active_runs: int
    runs_today: int
    """That have ended on the present day, in UTC."""
    tokens_today: int
    """Of those, of input and output together."""


class GetTenant(Request[TenantStanding]):
    """The tenant itself."""

    tenant: TenantId


class TenantChanges(Changes):
    """What is to be changed of a tenant; of the limits, too, only those that are set."""

    name: AccountName = ""
    logins: Logins = ()
    limits: Limits = Field(default_factory=Limits)


class UpdateTenant(Request[Tenant]):
    """Rename a tenant, or change who may act for it and how much it may ask for."""

    tenant: TenantId
    changes: TenantChanges


class DeleteTenant(Request[Done]):
    """Delete a tenant. Its keys are dead and its runs are cancelled at once; what it held is removed by and by."""

    tenant: TenantId


class CreateKey(Request[ApiKey]):
    """Make a key. A limit above the tenant's is `invalid_request`."""

    tenant: TenantId
    key: NewKey


class ListKeys(Request[ApiKeyPage]):
    """A tenant's keys in the order of their creation."""

    tenant: TenantId
    limit: PageLimit
    cursor: Cursor | None


class RevokeKey(Request[Done]):
    """Revoke a key of that tenant, for good. Once more is not an error."""

    tenant: TenantId
    key_id: Id


class RequestCount(Contract):
    """How many requests were made with a key; of a tenant that is limited, also what its other keys have made counts.

    key_id: None if only the tenant is limited.
    """

    tenant: TenantId
    key_id: Id | None
    requests: int


class RequestRate(Contract):
    """How many requests were made in a minute and in the minute before it, by everybody whom this store heard of."""

    subject: str
    """The tenant's or the key's id."""
    before: int
    now: int


class RequestRates(Contract):
    """The rates of those who were reported, `elapsed_s` seconds after the minute began."""

    minute: int
    elapsed_s: float
    rates: Annotated[tuple[RequestRate, ...], Field(strict=False)]


class ReportRequests(Request[RequestRates]):
    """An api replica tells what it has answered since it last did, and hears what all of them have together."""

    counts: Annotated[tuple[RequestCount, ...], Field(max_length=SUBJECTS_MAX, strict=False)]


UsageGroup = Literal["key", "chatbot"]


class DayOfUsage(Contract):
    """What the runs of a tenant that ended on one day, in UTC, have cost; by key or chatbot if that was asked for.

    estimated: a part of these tokens was not counted by a provider.
    """

    date: date
    key_id: str | None = None
    chatbot_id: str | None = None
    runs: int
    input_tokens: int
    output_tokens: int
    estimated: bool
    input_words: int = 0
    """Of the messages that turns came with."""
    output_words: int = 0
    """Of the answers; of one that its worker did not hand in, as many as its tokens make about."""


class UsagePage(Contract):
    """Days of usage, the oldest first; a day without runs is left out."""

    data: Annotated[tuple[DayOfUsage, ...], Field(strict=False)]
    next_cursor: Cursor | None


class GetUsage(Request[UsagePage]):
    """What the tenant's runs have cost, day by day, both days included.

    end_user, chatbot_id: only what was asked for them, or of that chatbot.
    """

    tenant: TenantId
    first: date
    last: date
    by: UsageGroup | None = None
    end_user: EndUser | None = None
    chatbot_id: Id | None = None
    limit: PageLimit
    cursor: Cursor | None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.last < self.first:
            raise ValueError("to must not be before from")
        if (self.last - self.first).days >= USAGE_DAYS_MAX:
            raise ValueError(f"at most {USAGE_DAYS_MAX} days at a time")
        return self
