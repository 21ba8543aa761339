"""LedgerAdmin over gRPC: who asks and what an error is called. Nothing is decided here.

The actor of a change is the caller's identity and its `x-actor` metadata (ledger_sync/callers.py): it goes to the audit
log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, NoReturn, TypeVar

import grpc
import structlog

from entitlement.errors import EntitlementError, IdempotencyMismatch, InvalidArgument, Unavailable
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer
from ledger_sync import callers
from ledger_sync.control import ControlPlane
from ledger_sync.ledger import LedgerUnavailable
from ledger_sync.reconcile import Report
from ledger_sync.refusals import AlreadyExists, FailedPrecondition, NotFound
from ledger_sync.translate import page_of

MAX_DRIFTS: Final = 1_000  # in one report; more are counted

# What an error is called on the wire; the first that fits.
_CODES: Final[tuple[tuple[type[EntitlementError], grpc.StatusCode], ...]] = (
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (IdempotencyMismatch, grpc.StatusCode.ALREADY_EXISTS),
    (FailedPrecondition, grpc.StatusCode.FAILED_PRECONDITION),
    (LedgerUnavailable, grpc.StatusCode.UNAVAILABLE),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
)

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Context = grpc.aio.ServicerContext[Asked, Answer]

log = structlog.get_logger(__name__)


def _answered(
    call: Callable[[LedgerAdmin, Asked, str], Awaitable[Answer]],
) -> Callable[[LedgerAdmin, Asked, Context[Asked, Answer]], Awaitable[Answer]]:
    """Gives `call` the actor, and its errors their status."""

    async def answer(self: LedgerAdmin, request: Asked, context: Context[Asked, Answer]) -> Answer:
        try:
            return await call(self, request, callers.actor(context.invocation_metadata() or ()))
        except EntitlementError as error:
            await _refuse(context, error)
        except Exception as error:  # The edge: a fault of ours is counted and told as such, without its insides.
            log.exception("admin call failed", call=call.__name__, error=type(error).__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has more")

    return answer


async def _refuse(context: Context[Asked, Answer], error: EntitlementError) -> NoReturn:
    code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
    if code is grpc.StatusCode.INTERNAL:
        log.error("admin call refused", error=str(error))
    await context.abort(code, str(error))


class LedgerAdmin(LedgerAdminServicer):
    """The servicer. Register it with `add_LedgerAdminServicer_to_server`."""

    def __init__(self, control: ControlPlane) -> None:
        self._control = control

    @_answered
    async def PutFeature(self, request: pb.Feature, actor: str) -> pb.Feature:
        feature = await self._control.catalogs.put_feature(request, actor)
        await self._control.catalog_changed()
        return feature

    @_answered
    async def ListFeatures(self, request: pb.ListRequest, actor: str) -> pb.ListFeaturesResponse:
        return await self._control.catalogs.list_features(page_of(request, after=(str,)))

    @_answered
    async def PutRateCard(self, request: pb.RateCard, actor: str) -> pb.RateCard:
        card = await self._control.catalogs.put_rate_card(request, actor)
        await self._control.catalog_changed()
        return card

    @_answered
    async def ListRateCards(self, request: pb.ListRequest, actor: str) -> pb.ListRateCardsResponse:
        return await self._control.catalogs.list_rate_cards(page_of(request, after=(str, int)))

    @_answered
    async def PutCustomer(self, request: pb.Customer, actor: str) -> pb.Customer:
        customer = await self._control.customers.put_customer(request, actor)
        await self._control.customer_changed(customer.id)
        return customer

    @_answered
    async def ListCustomers(self, request: pb.ListRequest, actor: str) -> pb.ListCustomersResponse:
        return await self._control.customers.list_customers(page_of(request, after=(str,)))

    @_answered
    async def PutContract(self, request: pb.Contract, actor: str) -> pb.Contract:
        contract = await self._control.contracts.put(request, actor)
        if contract.overrides:
            await self._control.catalog_changed()
        await self._control.customer_changed(contract.customer)
        return contract

    @_answered
    async def ListContracts(self, request: pb.ListRequest, actor: str) -> pb.ListContractsResponse:
        return await self._control.contracts.list(page_of(request, after=(str,), customer=True))

    @_answered
    async def CreateGrant(self, request: pb.Grant, actor: str) -> pb.Grant:
        grant = await self._control.grants.create(request, actor)
        self._control.pusher.wake()
        return grant

    @_answered
    async def VoidGrant(self, request: pb.VoidGrantRequest, actor: str) -> pb.Grant:
        grant = await self._control.grants.void(request, actor)
        self._control.pusher.wake()
        return grant

    @_answered
    async def ListGrants(self, request: pb.ListRequest, actor: str) -> pb.ListGrantsResponse:
        return await self._control.grants.list(page_of(request, after=(int,), customer=True))

    @_answered
    async def ListRecurringGrants(self, request: pb.ListRequest, actor: str) -> pb.ListGrantsResponse:
        return await self._control.grants.list_recurring(page_of(request, after=(str,), customer=True))

    @_answered
    async def ListTransactions(self, request: pb.ListRequest, actor: str) -> pb.ListTransactionsResponse:
        return await self._control.transactions.list(page_of(request, after=(int,), customer=True, times=True))

    @_answered
    async def ListDeadLetters(self, request: pb.ListRequest, actor: str) -> pb.ListDeadLettersResponse:
        return await self._control.dead_letters.list(page_of(request, after=(int,), customer=True))

    @_answered
    async def RetryDeadLetters(self, request: pb.RetryDeadLettersRequest, actor: str) -> pb.RetryDeadLettersResponse:
        return await self._control.dead_letters.retry(request, actor)

    @_answered
    async def ListQuarantine(self, request: pb.ListRequest, actor: str) -> pb.ListQuarantineResponse:
        return await self._control.quarantine.list(page_of(request, after=(int,), customer=True))

    @_answered
    async def RetryQuarantine(self, request: pb.QuarantineRequest, actor: str) -> pb.QuarantineResponse:
        answer = await self._control.quarantine.retry(request, actor)
        self._control.pusher.wake()
        return answer

    @_answered
    async def DropQuarantine(self, request: pb.QuarantineRequest, actor: str) -> pb.QuarantineResponse:
        answer = await self._control.quarantine.drop(request, actor)
        self._control.pusher.wake()
        return answer

    @_answered
    async def RecordUsage(self, request: pb.RecordUsageRequest, actor: str) -> pb.RecordUsageResponse:
        if request.backfill_id:
            return await self._control.backfills.gather(request, actor)
        return await self._control.usage.record(request, actor)

    @_answered
    async def CloseBackfill(self, request: pb.BackfillRequest, actor: str) -> pb.Backfill:
        return await self._control.backfills.close(request, actor)

    @_answered
    async def RevertBackfill(self, request: pb.BackfillRequest, actor: str) -> pb.Backfill:
        backfill = await self._control.backfills.revert(request, actor)
        self._control.pusher.wake()
        return backfill

    @_answered
    async def Explain(self, request: pb.ExplainRequest, actor: str) -> pb.Explanation:
        return await self._control.transactions.explain(request)

    @_answered
    async def Verify(self, request: pb.VerifyRequest, actor: str) -> pb.VerifyReport:
        report = await self._control.reconciler.verify(request.customer, repair=request.repair, actor=actor)
        return _report_message(report)

    @_answered
    async def PreviewRerate(self, request: pb.RerateRequest, actor: str) -> pb.RerateReport:
        return await self._control.rerates.preview(request)

    @_answered
    async def Rerate(self, request: pb.RerateRequest, actor: str) -> pb.RerateReport:
        report = await self._control.rerates.rerate(request, actor)
        self._control.pusher.wake()
        return report

    @_answered
    async def GetInvoice(self, request: pb.GetInvoiceRequest, actor: str) -> pb.Invoice:
        return await self._control.invoices.get(request)

    @_answered
    async def ListInvoices(self, request: pb.ListRequest, actor: str) -> pb.ListInvoicesResponse:
        return await self._control.invoices.list(page_of(request, after=(str,), customer=True, times=True))

    @_answered
    async def VoidInvoice(self, request: pb.VoidInvoiceRequest, actor: str) -> pb.Invoice:
        return await self._control.invoices.void(request, actor)

    @_answered
    async def ListAudit(self, request: pb.ListRequest, actor: str) -> pb.ListAuditResponse:
        return await self._control.audit.list(page_of(request, after=(int,), times=True))

    @_answered
    async def VerifyAudit(self, request: pb.VerifyAuditRequest, actor: str) -> pb.AuditReport:
        return await self._control.audit.verify(request)

    @_answered
    async def Examine(self, request: pb.ExamineRequest, actor: str) -> pb.Examination:
        if self._control.examiner is None:
            raise FailedPrecondition("examine", "nothing runs here that could be examined")
        return await self._control.examiner.examine()


def _report_message(report: Report) -> pb.VerifyReport:
    totals = report.totals
    return pb.VerifyReport(
        customers=report.customers,
        drifted=report.drifted,
        drift_nanos=min(report.drift_nanos, MAX_NANOS),
        unbalanced_transactions=totals.unbalanced,
        journal_lag=report.lag,
        drifts=[
            pb.Drift(
                customer=item.customer,
                hot_nanos=item.difference.hot,
                ledger_nanos=item.difference.ledger,
                sequence=item.sequence,
                part=item.difference.part,
            )
            for item in report.drifts[:MAX_DRIFTS]
        ],
        events=totals.events,
        quarantined=totals.quarantined,
        outbox_pending=totals.outbox_pending,
        sequence_gaps=totals.gaps,
        total_nanos=min(totals.total_nanos, MAX_NANOS),
        findings=[
            pb.Finding(customer=item.customer, name=item.name, detail=item.detail)
            for item in report.findings[:MAX_DRIFTS]
        ],
    )
