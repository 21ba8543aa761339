"""Features and rate cards in the ledger. A rate card's versions are immutable; a put adds one, or finds the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from entitlement.account import Config, Status
from entitlement.catalog import Catalogs, Durability, Feature, Kind, Policy, RateCard, Snapshot
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.rating import Rate
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, overrides, rate_cards
from ledger_sync.catalog_messages import card_message, checked_feature, checked_rates, feature_message
from ledger_sync.contracts import DERIVED
from ledger_sync.refusals import FailedPrecondition
from ledger_sync.translate import Page, page_token, to_ms

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

MAX_FEATURES: Final = 1_000  # of a tenant: the catalogue is one value in the hot store
MAX_POLICIES: Final = 10_000  # customers who may go on while the hot store is away: each gateway knows them
MAX_VERSIONS: Final = 1_000  # of a rate card


class CatalogStore:
    """Every put is one transaction, which also counts up the tenant's generation when it changes something."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self.tenant = tenant

    async def put_feature(self, message: pb.Feature, actor: str) -> pb.Feature:
        """Creates a feature or changes its unit, shadow mode or value. What it is (`kind`) stays for ever."""
        feature = checked_feature(message)
        async with self._ledger.transaction() as connection:
            await rate_cards.lock(connection, self.tenant)
            row = await connection.fetchrow(
                "SELECT * FROM features WHERE tenant = $1 AND key = $2", self.tenant, feature.key
            )
            if row and _feature(row) == feature:
                return feature_message(feature)
            await self._check_feature_fits(connection, feature, row)
            await connection.execute(
                """INSERT INTO features (tenant, key, kind, unit, shadow, value, durability)
                   VALUES ($1, $2, $3, $4, $5, $6, $7)
                   ON CONFLICT (tenant, key) DO UPDATE SET unit = $4, shadow = $5, value = $6, durability = $7""",
                *(self.tenant, feature.key, int(feature.kind), feature.unit, feature.shadow, feature.value),
                int(feature.durability),
            )
            await rate_cards.count_up(connection, self.tenant)
            detail = f"unit={feature.unit!r} shadow={feature.shadow} durability={feature.durability.name}"
            await changes.audit(connection, self.tenant, actor, "PutFeature", feature.key, detail)
        return feature_message(feature)

    async def _check_feature_fits(self, connection: Connection, feature: Feature, row: Row | None) -> None:
        if row and row["kind"] != feature.kind:
            raise InvalidArgument("kind", f"is {Kind(row['kind']).name} and cannot change; make another feature")
        count = await connection.fetchval("SELECT count(*) FROM features WHERE tenant = $1", self.tenant)
        if row is None and count >= MAX_FEATURES:
            raise FailedPrecondition("key", f"there are {count} features; expected at most {MAX_FEATURES}")

    async def list_features(self, page: Page) -> pb.ListFeaturesResponse:
        """By key."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                "SELECT * FROM features WHERE tenant = $1 AND key > $2 ORDER BY key LIMIT $3",
                *(self.tenant, page.after[0] if page.after else "", page.size + 1),
            )
        response = pb.ListFeaturesResponse(features=[feature_message(_feature(row)) for row in rows[: page.size]])
        if len(rows) > page.size:
            response.next_page_token = page_token(response.features[-1].key)
        return response

    async def put_rate_card(self, message: pb.RateCard, actor: str) -> pb.RateCard:
        """Adds a version, in force from effective_at (unset: the first version since ever, a later one from now).

        The same content again gives the version that has it: with effective_at, the one in force from then; without,
        the newest.
        """
        check_id("id", message.id)
        check_id("credit_type", message.credit_type)
        if message.id.startswith(DERIVED):
            raise InvalidArgument(
                "id", f"{message.id[:40]!r} begins with {DERIVED!r}, which is for contracts' own rates"
            )
        if message.version:
            raise InvalidArgument("version", "is set by the server; leave the field out")
        rates = checked_rates(message)
        effective_ms = to_ms("effective_at", message.effective_at) if message.HasField("effective_at") else None
        async with self._ledger.transaction() as connection:
            await rate_cards.lock(connection, self.tenant)
            await changes.check_features(
                connection, self.tenant, [(f"rates[{n}].feature", rate.feature) for n, rate in enumerate(rates)]
            )
            await rate_cards.refuse_unmetered(connection, self.tenant, "rates", rates)
            versions = await rate_cards.versions(connection, self.tenant, message.id)
            if same := _same(versions, rates, message.credit_type, effective_ms):
                return card_message(same)
            card = await self._next(connection, versions, message, rates, effective_ms)
            await rate_cards.write(connection, self.tenant, card)
            await overrides.follow(connection, self.tenant, card.id)
            await rate_cards.count_up(connection, self.tenant)
            detail = f"version={card.version} effective_ms={card.effective_ms} rates={len(rates)}"
            await changes.audit(connection, self.tenant, actor, "PutRateCard", card.id, detail)
        return card_message(card)

    async def _next(
        self,
        connection: Connection,
        versions: list[RateCard],
        message: pb.RateCard,
        rates: tuple[Rate, ...],
        effective_ms: int | None,
    ) -> RateCard:
        if versions and versions[-1].credit_type != message.credit_type:
            raise InvalidArgument(
                "credit_type", f"is {versions[-1].credit_type!r} in every version; make another rate card"
            )
        if len(versions) >= MAX_VERSIONS:
            raise FailedPrecondition("id", f"has {len(versions)} versions; expected at most {MAX_VERSIONS}")
        if effective_ms is None:
            effective_ms = await changes.now_ms(connection) if versions else 0
        version = versions[-1].version + 1 if versions else 1
        return RateCard(message.id, version, effective_ms, message.credit_type, rates)

    async def list_rate_cards(self, page: Page) -> pb.ListRateCardsResponse:
        """Every version of every card, by id and version."""
        after = page.after or ("", 0)
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT id, version, effective_ms, credit_type, rates FROM rate_cards
                   WHERE tenant = $1 AND (id, version) > ($2, $3) AND id NOT LIKE '=%' ORDER BY id, version LIMIT $4""",
                *(self.tenant, *after, page.size + 1),
            )
        response = pb.ListRateCardsResponse(
            rate_cards=[card_message(rate_cards.card_of(row)) for row in rows[: page.size]]
        )
        if len(rows) > page.size:
            last = rows[page.size - 1]
            response.next_page_token = page_token(last["id"], last["version"])
        return response

    async def generation(self) -> int:
        """Counts up with every change."""
        async with self._ledger.transaction(readonly=True) as connection:
            return await _generation(connection, self.tenant)

    async def snapshot(self) -> Catalogs:
        """The whole catalogue, as of one moment."""
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            generation = await _generation(connection, self.tenant)
            features = await connection.fetch("SELECT * FROM features WHERE tenant = $1 ORDER BY key", self.tenant)
            cards = await connection.fetch(
                """SELECT id, version, effective_ms, credit_type, rates FROM rate_cards WHERE tenant = $1
                   ORDER BY id, version""",
                self.tenant,
            )
            policies = await _policies(connection, self.tenant)
        listed = (tuple(map(_feature, features)), tuple(map(rate_cards.card_of, cards)), policies)
        return Catalogs(generation, (Snapshot(self.tenant, generation, *listed),))

    async def policies(self) -> tuple[Policy, ...]:
        """Who may go on while the hot store is away, now."""
        async with self._ledger.transaction(readonly=True) as connection:
            return await _policies(connection, self.tenant)

    async def count_up(self) -> None:
        """Something of the snapshot that is no catalogue's entry has changed."""
        async with self._ledger.transaction() as connection:
            await rate_cards.count_up(connection, self.tenant)


def _same(versions: list[RateCard], rates: tuple[Rate, ...], credit: str, effective_ms: int | None) -> RateCard | None:
    wanted = (
        versions[-1:] if effective_ms is None else [card for card in versions if card.effective_ms == effective_ms][-1:]
    )
    return next((card for card in wanted if (card.rates, card.credit_type) == (rates, credit)), None)


async def _generation(connection: Connection, tenant: str) -> int:
    query = "SELECT coalesce(max(generation), 0) FROM catalogs WHERE tenant = $1"
    generation: int = await connection.fetchval(query, tenant)
    return generation


async def _policies(connection: Connection, tenant: str) -> tuple[Policy, ...]:
    rows = await connection.fetch(
        """SELECT c.customer, c.continues, a.config
           FROM contracts c JOIN accounts a USING (tenant, customer)
           WHERE c.tenant = $1 AND c.state = 1 AND c.continues > 0 ORDER BY c.customer LIMIT $2""",
        *(tenant, MAX_POLICIES),
    )
    found = [(row["customer"], row["continues"], Config.decode(row["config"])) for row in rows]
    return tuple(
        Policy(customer, config.plan, allowance, config.entitled)
        for customer, allowance, config in found
        if config.status is Status.ACTIVE
    )


def _feature(row: Row) -> Feature:
    return Feature(
        row["key"], Kind(row["kind"]), row["unit"], row["shadow"], row["value"], Durability(row["durability"])
    )
