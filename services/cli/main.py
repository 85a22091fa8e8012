"""The operator's command line: asks the conversation store over the broker, as any other client does.

    python -m services.cli dead-letters list
    python -m services.cli dead-letters replay ID
    python -m services.cli keys create --tenant default --name website --scope chat
    python -m services.cli keys list --tenant default
    python -m services.cli keys revoke ID --tenant default
    python -m services.cli erase conversation|chatbot ID

Exit codes: 0 done; 1 the store refuses; 2 wrong usage or a wrong setting; 3 broker or store do not answer; 4 an erasure
goes on, but was not waited for any longer.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from services.cli.tables import table
from shared.backoff import pauses
from shared.broker import BrokerError, NoReply, Unroutable, open_broker
from shared.contracts.accounts import NAME_MAX_CHARACTERS, AccountName, ApiKey, CreateKey, ListKeys, NewKey, RevokeKey
from shared.contracts.base import Contract, Id, Request, TenantId
from shared.contracts.erasure import Erase, Erasure, Kind
from shared.contracts.problems import Problem, ServiceError
from shared.contracts.resources import Scope
from shared.contracts.store import PAGE_LIMIT_DEFAULT, PAGE_LIMIT_MAX, DeadLetter, ListDeadLetters, ReplayDeadLetter
from shared.ids import digest, new_id, new_key
from shared.process import cause, load_settings
from shared.settings import Settings
from shared.telemetry import configure_logging

CONNECT_S = 8.0
ANSWER_S = 12.0

REFUSED, NO_ANSWER, NOT_YET_DONE = 1, 3, 4

ERASED_WITHIN_S = 300
"""Longer than the second cleaning takes, which comes a minute after the first."""

R = TypeVar("R", bound=Contract)


class CommandFailed(Exception):
    """A command did not do what it was asked for; the message is for the person at the terminal."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Store:
    """The conversation store, as the command line reaches it: one connection per question, which are few."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.amqp_url.get_secret_value()

    async def ask(self, request: Request[R]) -> R:
        """The store's answer. Raises CommandFailed."""
        try:
            async with open_broker(self._url, "cli", patience=CONNECT_S) as broker:
                try:
                    return await broker.call(request, ANSWER_S)
                except (BrokerError, ServiceError) as error:
                    failure: Exception = error
        except ExceptionGroup as group:
            failure = cause(group)
        raise _failed(failure) from failure


async def list_dead_letters(store: Store, limit: int) -> str:
    """A table of what was set aside, newest first."""
    letters: list[DeadLetter] = []
    cursor = None
    while len(letters) < limit:
        wanted = min(PAGE_LIMIT_MAX, limit - len(letters))
        page = await store.ask(ListDeadLetters(limit=wanted, cursor=cursor))
        letters += page.data
        if (cursor := page.next_cursor) is None:
            break
    if not letters:
        return "there are no dead letters"
    titles = ("ID", "DIED AT", "TYPE", "QUEUE", "REASON", "RUN", "BYTES", "REPLAYED AT")
    lines = table(titles, [_row(letter) for letter in letters])
    if cursor is not None:
        lines += f"\nthere are more than these {len(letters)}: --limit {2 * limit} shows them"
    return lines


async def replay_dead_letter(store: Store, id_: str) -> str:
    """Has a dead message tried again."""
    letter = await store.ask(ReplayDeadLetter(dead_letter_id=id_))
    about = "" if letter.run_id is None else f" of run {letter.run_id}"
    return f"replayed: {letter.type}{about}"


async def create_key(store: Store, tenant: str, name: str, scope: Scope) -> str:
    """Makes a key, and tells its secret."""
    id_ = new_id()
    secret, prefix = new_key(id_)
    key = NewKey(id=id_, name=name, scope=scope, prefix=prefix, digest=digest(secret))
    await store.ask(CreateKey(tenant=tenant, key=key))
    return f"{secret}\nThis is key {id_}; what is above is told this once."


async def list_keys(store: Store, tenant: str) -> str:
    """A table of a tenant's keys, in the order of their creation."""
    keys: list[ApiKey] = []
    cursor = None
    while True:
        page = await store.ask(ListKeys(tenant=tenant, limit=PAGE_LIMIT_MAX, cursor=cursor))
        keys += page.data
        if (cursor := page.next_cursor) is None:
            break
    if not keys:
        return "there are no keys"
    titles = ("ID", "NAME", "SCOPE", "CREATED AT", "LAST USED AT", "REVOKED AT")
    rows = [
        (key.id, _printable(key.name), key.scope, *map(_shown, (key.created_at, key.last_used_at, key.revoked_at)))
        for key in keys
    ]
    return table(titles, rows)


async def revoke_key(store: Store, tenant: str, id_: str) -> str:
    """Revokes a key."""
    await store.ask(RevokeKey(tenant=tenant, key_id=id_))
    return f"revoked: {id_} is dead everywhere within 30 s"


def _shown(time: datetime | None) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S}" if time else "-"


async def erase(store: Store, kind: Kind, id_: str, wait_s: float) -> str:
    """Deletes a conversation or a chatbot, and waits until nothing is left of its texts; what was removed."""
    clock = asyncio.get_running_loop().time
    until, told, waits = clock() + wait_s, "", pauses(0.2, 5.0)
    while not (erasure := await store.ask(Erase(kind=kind, id=id_))).is_done:
        if (left := _left(erasure)) != told:
            sys.stderr.write(f"parley: {left}\n")
            told = left
        if clock() >= until:
            raise CommandFailed(f"the erasure goes on: {left}; ask again to see how far it is", NOT_YET_DONE)
        await asyncio.sleep(max(0.0, min(next(waits), until - clock())))
    removed = erasure.removed
    return (
        f"erased {kind} {id_}: {removed.conversations} conversations, {removed.turns} turns,"
        f" {removed.dead_letters} dead letters"
    )


def _left(erasure: Erasure) -> str:
    """What is waited for."""
    left = {
        "conversations to be cleaned": erasure.conversations_left,
        "runs at work": erasure.runs_left,
        "jobs in the queue": erasure.jobs_left,
        "second cleaning": 0 if erasure.is_clean else 1,
    }
    return "left: " + ", ".join(f"{count} {name}" for name, count in left.items() if count)


def _row(letter: DeadLetter) -> tuple[str, ...]:
    died_at, replayed_at = map(_shown, (letter.died_at, letter.replayed_at))
    # Some of it was written by whoever sent the message.
    said = [_printable(text) for text in (letter.type, letter.queue, letter.reason)]
    return letter.id, died_at, *said, letter.run_id or "-", str(letter.size), replayed_at


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text[:60]) or "-"


def _failed(error: Exception) -> CommandFailed:
    match error:
        case ServiceError():
            return _refused(error.problem)
        case NoReply():
            return CommandFailed(f"the conversation store does not answer within {ANSWER_S:g} s: is it up?", NO_ANSWER)
        case Unroutable():
            return CommandFailed("no conversation store has ever run on this broker", NO_ANSWER)
        case BrokerError():
            return CommandFailed(f"RabbitMQ is not reached: {error}", NO_ANSWER)
        case _:
            raise error


def _refused(problem: Problem) -> CommandFailed:
    places = [f"{error.path}: {error.message}" for error in problem.errors]
    message = f"the store refuses: {'; '.join([problem.detail, *places])} ({problem.code})"
    return CommandFailed(message, NO_ANSWER if problem.code == "unavailable" else REFUSED)


def _id(text: str) -> str:
    return _valid(Id, text, "is no id: `list` shows them")


def _tenant(text: str) -> str:
    return _valid(TenantId, text, "is no id of a tenant")


def _name(text: str) -> str:
    return _valid(AccountName, text, f"is no name of 1 to {NAME_MAX_CHARACTERS} characters")


def _valid(kind: Any, text: str, fault: str) -> str:
    try:
        return str(TypeAdapter(kind).validate_python(text))
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} {fault}") from None


def _any_id(text: str) -> str:
    try:
        return Erase(kind="conversation", id=text.lower()).id
    except ValidationError:
        raise argparse.ArgumentTypeError(f"{text!r} is no id") from None


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100000")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="parley", description="What operators ask of Parley's conversation store.")
    parts = parser.add_subparsers(dest="part", required=True, metavar="COMMAND")
    description = "Messages that could not be handled are kept for 30 days, and can be tried again."
    letters = parts.add_parser("dead-letters", help="messages that could not be handled", description=description)
    commands = letters.add_subparsers(dest="command", required=True, metavar="list|replay")
    listing = commands.add_parser("list", help="show them, newest first; times are UTC")
    listing.add_argument("--limit", type=_count, default=PAGE_LIMIT_DEFAULT, help="how many (default: %(default)s)")
    listing.set_defaults(run=lambda store, given: list_dead_letters(store, given.limit))
    replaying = commands.add_parser("replay", help="try one again, once what killed it is mended")
    replaying.add_argument("id", type=_id, metavar="ID")
    replaying.set_defaults(run=lambda store, given: replay_dead_letter(store, given.id))
    keys = parts.add_parser("keys", help="the keys of a tenant", description="What opens the HTTP API to a tenant.")
    _add_keys(keys.add_subparsers(dest="command", required=True, metavar="create|list|revoke"))
    description = "What is deleted leaves no text in any collection or queue; this waits until it is so."
    erasing = parts.add_parser("erase", help="delete something with all its texts", description=description)
    erasing.add_argument("kind", choices=get_args(Kind), help="what it is")
    erasing.add_argument("id", type=_any_id, metavar="ID", help="its id")
    limit = "how many seconds to wait at most (default: %(default)s)"
    erasing.add_argument("--wait", type=_count, default=ERASED_WITHIN_S, metavar="SECONDS", help=limit)
    erasing.set_defaults(run=lambda store, given: erase(store, given.kind, given.id, given.wait))
    return parser


def _add_keys(commands: Any) -> None:
    creating = commands.add_parser("create", help="make one, and show its secret, this once")
    creating.add_argument("--name", type=_name, required=True, help="what it is for")
    creating.add_argument("--scope", choices=get_args(Scope), default="chat", help="default: %(default)s")
    creating.set_defaults(run=lambda store, given: create_key(store, given.tenant, given.name, given.scope))
    listing = commands.add_parser("list", help="show them in the order of their creation; times are UTC")
    listing.set_defaults(run=lambda store, given: list_keys(store, given.tenant))
    revoking = commands.add_parser("revoke", help="revoke one, for good")
    revoking.add_argument("id", type=_id, metavar="ID")
    revoking.set_defaults(run=lambda store, given: revoke_key(store, given.tenant, given.id))
    for command in (creating, listing, revoking):
        command.add_argument("--tenant", type=_tenant, required=True, help="whose: `default`, or a tenant's id")


async def _run(options: argparse.Namespace, settings: Settings) -> str:
    said: str = await options.run(Store(settings), options)
    return said


def run(arguments: Sequence[str]) -> int:
    """Runs one command; its exit code."""
    options = _parser().parse_args(arguments)
    settings = load_settings(Settings)
    # What goes wrong is said once, in the end, and not each time that it was tried; not by the libraries either.
    configure_logging("cli", "critical")
    logging.disable(logging.CRITICAL)
    try:
        print(asyncio.run(_run(options, settings)))
    except CommandFailed as failure:
        sys.stderr.write(f"parley: {failure}\n")
        return failure.exit_code
    return 0


def main() -> None:
    """The command line of this process."""
    try:
        sys.exit(run(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
