"""What an answer costs: the tokens of its receipts, at the prices that the program was told.

The rule is the gateway's for budgets (docs/budgets.md): exact, and rounded up once for each request, to a millionth of the
currency's unit. The prices are the program's own knowledge: nobody signs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Final

from lacre.errors import UsageError
from lacre.runtime import arguments

Prices = Mapping[str, Mapping[str, str]]  # by the model's name, as the table `prices` of a gateway's plans.toml

ANY_MODEL: Final = "*"  # the price of every model without its own
_MEMBERS: Final = ("prompt", "cached", "completion")
_MICRO: Final = 10**6  # a currency's unit in micro-units, and the tokens that a price is of
_MOST: Final = 10**12  # a currency's units


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """Of one model, in micro-units for a million tokens. cached: of prompt tokens from the prefix cache."""

    prompt: int
    cached: int
    completion: int

    def of(self, prompt: int, cached: int, completion: int) -> int:
        """In micro-units, of one request. prompt: tokens, the cached ones among them."""
        total = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        return -(-total // _MICRO)


def amount(micro_units: int) -> Decimal:
    """In the currency's unit."""
    return Decimal(micro_units).scaleb(-6)


def price_of(prices: Mapping[str, TokenPrice], model: str) -> TokenPrice | None:
    return prices.get(model) or prices.get(ANY_MODEL)


def prices_of(given: Prices | None) -> dict[str, TokenPrice]:
    """Raises UsageError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UsageError(f"prices must be a mapping by the models' names, not {arguments.kind_of(given)}")
    return {arguments.text(name, "a model's name in prices"): _price(name, table) for name, table in given.items()}


def _price(name: str, table: object) -> TokenPrice:
    if not isinstance(table, Mapping) or set(table) != set(_MEMBERS):
        raise UsageError(f"prices[{name!r}] must have prompt, cached and completion: amounts for a million tokens")
    return TokenPrice(*(_micro_units(table[member], f"prices[{name!r}][{member!r}]") for member in _MEMBERS))


def _micro_units(value: object, where: str) -> int:
    """A float is binary, and would already be another amount."""
    try:
        units = Decimal(value).scaleb(6) if isinstance(value, str | Decimal) else None
    except InvalidOperation:
        units = None
    if units is None or not units.is_finite() or not 0 <= units < _MOST * _MICRO or units != int(units):
        raise UsageError(f'{where} must be an amount as text, with at most six decimals, such as "12.50"')
    return int(units)
