"""What must hold of every customer when nothing is on its way, from the ledger's tables and the hot accounts."""

from __future__ import annotations

from collections import Counter, defaultdict

from entitlement.journal import OVERAGE, Consumed, decode
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.install import ensure
from tests.control_rig import TENANT, Rig
from tests.model.life import Life

COMMIT = "revenue:=commit"

# What no final invoice has taken, and the draft therefore shows.
_OPEN = """
SELECT m.period_start, m.meter, m.quantity, m.amount, i.quantity AS taken_units, i.amount AS taken
FROM meters m LEFT JOIN invoiced i USING (tenant, customer, period_start, meter)
WHERE m.customer = $1 AND (m.quantity, m.amount) <> (coalesce(i.quantity, 0), coalesce(i.amount, 0))"""


async def check(life: Life) -> None:
    """Everything. Call it when the life is at rest."""
    rig = life.rig
    await verified(rig)
    await hot_is_ledger(life)
    await grants_are_accounted_for(rig)
    await customers_are_conserved(life)
    await answers_are_booked(life)
    await invoices_are_revenue(life)


async def verified(rig: Rig) -> None:
    report = await rig.stub.Verify(pb.VerifyRequest())
    assert not report.drifts, report
    assert (report.drifted, report.drift_nanos, report.unbalanced_transactions) == (0, 0, 0), report
    assert (report.quarantined, report.sequence_gaps, report.journal_lag) == (0, 0, 0), report


async def hot_is_ledger(life: Life) -> None:
    """Each account, as the hot store has it, against the ledger's rows."""
    rig, names = life.rig, [(TENANT, member.id) for member in life.members]
    await ensure(rig.hot, names)
    await life.rest()
    await ensure(rig.hot, names)
    accounts = {row["customer"]: row for row in await rig.rows("SELECT * FROM accounts")}
    left: dict[str, dict[int, int]] = defaultdict(dict)
    for row in await rig.rows(
        "SELECT g.customer, g.no, b.remaining FROM grants g JOIN grant_balances b ON b.grant_no = g.no"
    ):
        if row["remaining"]:
            left[row["customer"]][row["no"]] = row["remaining"]
    settled = {
        (row["customer"], row["period_start"]): row["settled"]
        for row in await rig.rows("SELECT * FROM account_periods")
    }
    meters = {
        (row["customer"], row["period_start"], row["meter"]): row["quantity"]
        for row in await rig.rows("SELECT * FROM meters")
    }
    for (_, name), hot in zip(names, await rig.hot.snapshots(names), strict=True):
        assert hot is not None, f"{name} is not hot"
        row = accounts[name]
        place = (hot.epoch, hot.sequence, hot.version)
        assert place == (row["epoch"], row["sequence"], row["version"]), name
        assert (hot.period_start, hot.period_end) == (row["period_start"], row["period_end"]), name
        assert (hot.overage, hot.held) == (row["overage"], row["held"] or 0), name
        assert {grant.no: grant.remaining for grant in hot.grants} == left[name], name
        assert hot.settled == settled.get((name, hot.period_start), 0), name
        for meter, units in hot.meters.items():
            assert units == meters.get((name, hot.period_start, meter), 0), (name, meter)
        for (start, meter), units in hot.archive.items():
            if start == hot.period_start:  # What it was before the page was turned to it once more.
                continue
            there = meters.get((name, start, meter), 0)
            assert units == there, (name, start, meter, units, there, hot, row)


async def grants_are_accounted_for(rig: Rig) -> None:
    """granted = left + paid + rolled over + voided, of each grant, to the nano. What it has paid is what the journal's
    records (the corrected ones, where they were) say.
    """
    burned: Counter[int] = Counter()
    for row in await rig.rows(
        """SELECT coalesce((SELECT c.record FROM corrections c WHERE c.tenant = u.tenant
                                  AND c.idempotency_key = u.idempotency_key ORDER BY no DESC LIMIT 1),
                          u.record) AS record
           FROM usage_events u"""
    ):
        record = decode(row["record"])
        assert isinstance(record, Consumed)
        for line in record.lines:
            for burn in line.burns:
                burned[burn.grant] += burn.amount
    del burned[OVERAGE]
    booked: dict[int, Counter[str]] = defaultdict(Counter)
    for row in await rig.rows(
        """SELECT e.grant_no, t.kind, sum(e.amount)::bigint AS amount FROM entries e
           JOIN transactions t ON t.id = e.transaction_id WHERE e.grant_no IS NOT NULL GROUP BY 1, 2"""
    ):
        kind = "usage" if row["kind"] in ("consume", "reverse", "rebook") else row["kind"]
        booked[row["grant_no"]][kind] += row["amount"]
    issued = {
        row["grant_no"]: (row["kind"], row["amount"])
        for row in await rig.rows(
            """SELECT e.grant_no, t.kind, e.amount FROM entries e JOIN transactions t ON t.id = e.transaction_id
               JOIN grants g ON g.no = e.grant_no
               WHERE t.kind IN ('grant', 'rollover') AND e.amount > 0 AND t.idempotency_key = g.id"""
        )
    }
    for row in await rig.rows(
        """SELECT g.*, b.remaining, b.broken, ledger_now_ms() AS now_ms
           FROM grants g JOIN grant_balances b ON b.grant_no = g.no"""
    ):
        no, parts = row["no"], booked[row["no"]]
        assert issued[no][1] == row["amount"], row
        assert parts["usage"] == -burned[no], row
        assert sum(parts.values()) == row["remaining"], row
        assert 0 <= row["broken"] <= row["remaining"] <= row["amount"], row
        assert set(parts) <= {"grant", "usage", "rollover", "void", "reclass", "repay"}, (row, parts)
        ended = 0 < row["expires_ms"] <= row["now_ms"]
        assert (row["swept"] > 0) == ended, row
        assert row["remaining"] == 0 or not row["voided_ms"], row
        assert row["broken"] == (row["remaining"] if row["swept"] == 1 else 0), row
        assert row["swept"] < 2 or row["remaining"] == 0, row


async def customers_are_conserved(life: Life) -> None:
    """granted + owed = available + settled + expired and voided, of each customer, each term from its own table."""
    ledger: dict[str, Counter[str]] = defaultdict(Counter)
    for row in await life.rig.rows(
        """SELECT t.customer, split_part(e.account, ':', 1) AS account, sum(e.amount)::bigint AS amount
           FROM entries e JOIN transactions t ON t.id = e.transaction_id GROUP BY 1, 2"""
    ):
        ledger[row["customer"]][row["account"]] = row["amount"]
    for row in await life.rig.rows(
        """SELECT a.customer, a.overage, a.held,
                  (SELECT coalesce(sum(amount), 0)::bigint FROM grants g WHERE g.customer = a.customer
                          AND NOT EXISTS (SELECT FROM transactions t WHERE t.kind = 'rollover'
                                                 AND t.idempotency_key = g.id)) AS granted,
                  (SELECT coalesce(sum(amount), 0)::bigint FROM grants g
                   WHERE g.customer = a.customer AND g.id LIKE 'g-%') AS given,
                  (SELECT coalesce(sum(remaining - broken), 0)::bigint FROM grants g
                   JOIN grant_balances b ON b.grant_no = g.no WHERE g.customer = a.customer) AS available,
                  (SELECT coalesce(sum(amount), 0)::bigint FROM usage_events u WHERE u.customer = a.customer)
                  + (SELECT coalesce(sum(difference), 0)::bigint FROM corrections c WHERE c.customer = a.customer)
                  AS used
           FROM accounts a"""
    ):
        name, parts = row["customer"], ledger[row["customer"]]
        assert sum(parts.values()) == 0, (name, parts)
        assert row["given"] == life.granted[name], name
        assert row["granted"] == -parts["issued"], (name, row, parts)
        assert row["available"] == parts["grant"] + parts["expired"], (name, row, parts)
        assert row["overage"] == -parts["overage"], (name, row, parts)
        commit = await _commit(life.rig, name)
        assert row["used"] == parts["revenue"] - commit, (name, row, parts)
        owed = row["overage"] - parts["receivable"] - commit
        assert row["granted"] + owed == row["available"] + row["held"] + row["used"] + parts["breakage"], (name, row)


async def answers_are_booked(life: Life) -> None:
    """Every answer that charged is in the ledger, at that amount, once; and nothing else is."""
    booked = {
        row["idempotency_key"]: row["amount"]
        for row in await life.rig.rows("SELECT idempotency_key, amount FROM usage_events")
    }
    assert {key: booked.get(key) for key in life.answers if key not in life.recorded} == {
        key: amount for key, amount in life.answers.items() if key not in life.recorded
    }
    assert booked.keys() == life.answers.keys() | life.recorded


async def invoices_are_revenue(life: Life) -> None:
    """All final invoices and the draft are the revenue of usage; true-ups and what is due are booked as that."""
    for member in life.members:
        invoices = await _finals(life.rig, member.id)
        draft = await life.rig.stub.GetInvoice(pb.GetInvoiceRequest(customer=member.id))
        lines = [line for invoice in (*invoices, draft) for line in invoice.lines if line.feature]
        revenue = await _sum(life.rig, member.id, "e.account LIKE 'revenue:%' AND e.account <> 'revenue:=commit'")
        open_ = await life.rig.rows(_OPEN, member.id)
        assert sum(line.amount_nanos for line in lines) == revenue, (member.id, draft, list(map(dict, open_)))
        units = await life.rig.value(
            "SELECT coalesce(sum(quantity), 0)::bigint FROM meters WHERE customer = $1", member.id
        )
        assert sum(line.quantity for line in lines) == units, member.id
        assert sum(invoice.minimum_commit_nanos for invoice in invoices) == await _commit(life.rig, member.id)
        receivable = await _sum(life.rig, member.id, "e.account LIKE 'receivable:%'")
        assert sum(invoice.due_nanos for invoice in invoices) == -receivable, member.id
        for invoice in (*invoices, draft):
            assert invoice.total_nanos == sum(line.amount_nanos for line in invoice.lines), invoice
            assert invoice.credits_applied_nanos == invoice.total_nanos - invoice.due_nanos, invoice


async def _finals(rig: Rig, customer: str) -> list[pb.Invoice]:
    found: list[pb.Invoice] = []
    token = ""
    while True:
        page = await rig.stub.ListInvoices(pb.ListRequest(customer=customer, page_size=1000, page_token=token))
        found += [invoice for invoice in page.invoices if invoice.status == pb.Invoice.FINAL]
        token = page.next_page_token
        if not token:
            return found


async def _commit(rig: Rig, customer: str) -> int:
    return await _sum(rig, customer, f"e.account = '{COMMIT}'")


async def _sum(rig: Rig, customer: str, where: str) -> int:
    found = await rig.value(
        f"""SELECT coalesce(sum(e.amount), 0)::bigint FROM entries e JOIN transactions t ON t.id = e.transaction_id
            WHERE t.customer = $1 AND {where}""",
        customer,
    )
    return int(str(found))
