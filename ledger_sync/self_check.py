"""At a start: whether the stores are such that anything may rest on them. The rules are entitlement.hot_store_health's
and ledger_sync.examine_database's, which `entitlement doctor` tells as well.
"""

from __future__ import annotations

from typing import Final

import structlog

from entitlement import hot_store_health
from entitlement.errors import InvalidArgument, Unavailable
from entitlement.examination import Check, Outcome
from entitlement.redis_address import Endpoint
from ledger_sync import examine_database
from ledger_sync.hot_store import Facts, HotStore
from ledger_sync.ledger import Ledger

_REFUSED: Final = (
    ("AuthenticationError", "its user or password is refused; correct it, or redis_password_file"),
    ("certificate verify failed", "its certificate is not the right one; correct redis_ca, or the host"),
    ("redis_password_file", "the file of redis_password_file cannot be read"),
)

log = structlog.get_logger(__name__)


async def self_check(hot: HotStore, endpoint: Endpoint, mode: str) -> None:
    """InvalidArgument: it does not take us for who we say we are; or it loses data or is unsafe, and `mode` is refuse.
    One that is away is not held against: it may come.
    """
    try:
        facts = await hot.facts()
    except Unavailable as error:
        _refused(error)
        log.warning("the hot store was not looked at", why=str(error))
        return
    if mode != "off":
        _judge(facts, hot, endpoint, mode)


def _refused(error: Unavailable) -> None:
    text = f"{type(error.__cause__).__name__}: {error}"
    for sign, problem in _REFUSED:
        if sign in text:
            raise InvalidArgument("redis_url", problem) from None


def _judge(facts: Facts, hot: HotStore, endpoint: Endpoint, mode: str) -> None:
    failed: list[Check] = []
    for node in facts.nodes:
        may = () if endpoint.is_local else node.beyond
        for check in hot_store_health.judge_start(node.info, node.config, cluster=hot.is_cluster, may=may):
            if check.outcome is not Outcome.OK:
                log.warning("hot store", check=check.name, found=check.found, fix=check.fix, checks=mode)
                failed.append(check)
    if mode == "refuse" and (why := hot_store_health.complaint(failed)):
        raise InvalidArgument("redis_url", f"{why}; or say redis_checks = warn")


async def database_check(ledger: Ledger, mode: str) -> None:
    """InvalidArgument: its database is older than is safe, or loses what it has committed, and `mode` is refuse."""
    if mode == "off":
        return
    wrong = await examine_database.unsafe(ledger)
    for check in wrong:
        log.warning("database", check=check.name, found=check.found, fix=check.fix, checks=mode)
    if wrong and mode == "refuse":
        why = "; ".join(f"{check.found}: {check.fix}" for check in wrong)
        raise InvalidArgument("database_url", f"{why}; or say database_checks = warn")
