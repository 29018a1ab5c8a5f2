"""`lacre budget tenants`, `top-up` and `reset`: an administrator's calls of a running gateway, which records them in its audit
log.
"""  # fmt: skip

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated

import typer

from lacre_gateway.admin.api_commands import AsJson, with_api

if TYPE_CHECKING:
    from lacre_gateway.admin.calls import AdminApi
    from lacre_gateway.admin.reports import TenantReport

AsCsv = Annotated[bool, typer.Option("--csv", help="Print CSV (RFC 4180), for a spreadsheet.")]
Tenant = Annotated[str | None, typer.Option(help="The tenant's name; without --user, all its users together.")]
User = Annotated[str | None, typer.Option(help="The subject of one user's tokens; needs --tenant and --plan.")]
PlanName = Annotated[str | None, typer.Option(help="The plan; alone, everyone on it together.")]
IssuerName = Annotated[str | None, typer.Option(help="The issuer of the user's tokens; may be omitted if there is only one.")]
LimitName = Annotated[str, typer.Option(help="The limit, as in plans.toml: tokens_per_day, for example.")]
Number = Annotated[
    str | None, typer.Option("--id", help="A name for this change: the same one again changes nothing. Default: a new one.")
]


def register(app: typer.Typer) -> None:
    app.command("tenants")(tenants)
    app.command("top-up")(top_up)
    app.command("reset")(reset)


@with_api
def tenants(
    api: AdminApi,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
) -> None:
    """List every tenant with its plan, its users and what they have used in the present windows."""
    from lacre.cli.output import say_csv, say_json, say_table
    from lacre_gateway.admin.reports import TenantsReport

    found = api.get("/v1/tenants", TenantsReport)
    if as_json:
        say_json(found.model_dump(mode="json"), indent=2)
        return
    headings = ("tenant", "plan", "users", "limit", "used")
    rows = [row for each in found.tenants for row in _rows(each, found.currency)]
    if as_csv:
        say_csv(headings, rows)
    else:
        say_table(headings, rows)
    if not found.complete:
        typer.echo("warning: there are more tenants than the gateway lists", err=True)


def _rows(tenant: TenantReport, currency: str) -> list[tuple[str, ...]]:
    """One for each limit that its users have used."""
    head = (tenant.tenant, tenant.plan or "", str(tenant.users))
    used = [(_named(limit, currency), _amount(limit, amount)) for limit, amount in tenant.used.items()]
    shared = [(f"{_named(each.kind, currency)}, shared", _amount(each.kind, each.used)) for each in tenant.budgets]
    return [(*head, *each) for each in (*used, *shared)] or [(*head, "", "")]


@with_api
def top_up(
    api: AdminApi,
    amount: Annotated[str, typer.Argument(help="By how much the limit rises: a whole number, or 12.50 for money.")],
    limit: LimitName,
    tenant: Tenant = None,
    user: User = None,
    plan: PlanName = None,
    issuer: IssuerName = None,
    number: Number = None,
    as_json: AsJson = False,
) -> None:
    """Raise one limit until its window ends, at every gateway. It can be repeated with the same --id.

    Example: lacre budget top-up 100000 --limit tokens_per_day --tenant acme --user alice --plan standard
    """
    body = _named_budget(limit, tenant, user, plan, issuer, number) | {"amount": _given_amount(limit, amount)}
    _change(api, "/v1/budgets/top-up", body, as_json=as_json)


@with_api
def reset(
    api: AdminApi,
    limit: LimitName,
    tenant: Tenant = None,
    user: User = None,
    plan: PlanName = None,
    issuer: IssuerName = None,
    number: Number = None,
    as_json: AsJson = False,
) -> None:
    """Give back the used amount of one limit in its window, at every gateway. It can be repeated with the same --id."""
    body = _named_budget(limit, tenant, user, plan, issuer, number)
    _change(api, "/v1/budgets/reset", body, as_json=as_json)


def _named_budget(
    limit: str, tenant: str | None, user: str | None, plan: str | None, issuer: str | None, number: str | None
) -> dict[str, object]:
    """The members of a call that name the budget. Its scope follows from the names that were given. Raises UsageError."""
    from lacre.errors import UsageError

    match tenant, user, plan:
        case str(), str(), str():
            scope = "user"
        case str(), None, str():
            scope = "tenant-on-plan"
        case str(), None, None:
            scope = "tenant"
        case None, None, str():
            scope = "plan"
        case _:
            raise UsageError(
                "name the budget: --tenant, --user and --plan for one user; --tenant, with or without --plan, for all users of "
                "a tenant; --plan for everyone on it"
            )
    names = {"tenant": tenant, "sub": user, "plan": plan, "issuer": issuer}
    given = {name: value for name, value in names.items() if value is not None}
    return {"scope": scope, "limit": limit, "id": number or secrets.token_hex(8), **given}


def _given_amount(limit: str, amount: str) -> int | str:
    """Raises UsageError."""
    from lacre.errors import UsageError
    from lacre_gateway.budget.plans import LimitKind

    if limit == LimitKind.MONEY_PER_MONTH.value:
        return amount
    if not amount.isascii() or not amount.isdecimal() or len(amount) > len(str(2**53)):
        raise UsageError(f"the amount {amount!r} is no whole number, which {limit} needs")
    return int(amount)


def _change(api: AdminApi, path: str, body: dict[str, object], *, as_json: bool) -> None:
    from pydantic import ValidationError

    from lacre.cli.output import date, printable, say, say_json
    from lacre.errors import NetworkError, Unavailable, UsageError
    from lacre_gateway.admin.reports import BudgetChanged, Reset, TopUp

    try:
        (TopUp if "amount" in body else Reset).model_validate(body)
    except ValidationError as exc:
        raise UsageError("; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in exc.errors())) from None
    try:
        done = api.post(path, body, BudgetChanged)
    except (NetworkError, Unavailable) as exc:
        exc.remedy = f"Whether it happened is not known: run the command again with --id {body['id']}, which is safe."
        raise
    if as_json:
        say_json(done.model_dump(mode="json"), indent=2)
        return
    until = "" if done.resets_at is None else f" until {date(done.resets_at)}"
    say(f"{printable(done.name)}: {done.limit} raised by {_amount(done.limit, done.added)}{until} (id {printable(done.id)})")


def _named(limit: str, currency: str) -> str:
    from lacre_gateway.budget.plans import LimitKind

    return f"{limit} ({currency})" if limit == LimitKind.MONEY_PER_MONTH.value else limit


def _amount(limit: str, amount: int) -> str:
    from lacre_gateway.budget.plans import LimitKind, money

    return money(amount) if limit == LimitKind.MONEY_PER_MONTH.value else str(amount)
