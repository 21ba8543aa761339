-- Contracts that follow one another, recurring and expired grants, invoices, corrections, backfills, top-ups and webhooks.

-- The ledger's clock, in milliseconds. One place, so that a simulation can put its own in.
CREATE FUNCTION ledger_now_ms() RETURNS bigint LANGUAGE sql VOLATILE AS
    $$ SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint $$;

-- 0 scheduled, 1 in force (at most one a customer), 2 ended.
ALTER TABLE contracts ADD COLUMN state smallint NOT NULL DEFAULT 1;
CREATE UNIQUE INDEX contracts_in_force ON contracts (tenant, customer) WHERE state = 1;
CREATE INDEX contracts_starting ON contracts (effective_ms) WHERE state = 0;
CREATE INDEX contracts_ending ON contracts (ends_ms) WHERE state = 1 AND ends_ms > 0;

-- When what is available falls below it, credit is bought; NULL: the contract has no such rule.
ALTER TABLE contracts ADD COLUMN top_up_below bigint;
-- It has a minimum commit: its account is installed even if nobody asks for it, so that its pages turn.
ALTER TABLE contracts ADD COLUMN commits boolean NOT NULL DEFAULT false;
CREATE INDEX contracts_committed ON contracts (tenant, customer) WHERE state = 1 AND commits;

-- Rates of a contract's own over time: from since_ms on, in place of those of `base` or beside them.
CREATE TABLE contract_rates (
    tenant     text NOT NULL,
    contract   text NOT NULL,
    since_ms   bigint NOT NULL,
    base       text NOT NULL,
    rates      jsonb NOT NULL,             -- entitlement.rating.Rate, as msgspec writes it
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, contract, since_ms)
);
CREATE INDEX contract_rates_base ON contract_rates (tenant, base);
CREATE INDEX contracts_top_up ON contracts (tenant, customer) WHERE state = 1 AND top_up_below IS NOT NULL;

-- The recurring grant (or contract, for its seats) that issued it.
ALTER TABLE grants ADD COLUMN source text NOT NULL DEFAULT '';
CREATE INDEX grants_source ON grants (tenant, source) WHERE source <> '';
-- 0 live, 1 expired and booked as such, 2 beyond the reach of late events. (No index may stand on a balance: they move
-- all the time, and are updated in place.)
ALTER TABLE grants ADD COLUMN swept smallint NOT NULL DEFAULT 0;
CREATE INDEX grants_expiring ON grants (expires_ms) WHERE expires_ms > 0 AND swept = 0;
CREATE INDEX grants_expired ON grants (expires_ms) WHERE expires_ms > 0 AND swept = 1;

-- Of what remains: booked to breakage when the grant expired ('expired:<grant id>' stands against it). The grant itself
-- stays as it is while late events may burn it; what they burn comes back from breakage.
ALTER TABLE grant_balances ADD COLUMN broken bigint NOT NULL DEFAULT 0 CHECK (broken >= 0);

-- Pages that are to be turned.
CREATE INDEX accounts_turning ON accounts (period_end) WHERE period_end > 0 AND epoch > 0;

-- What issues allotments: one grant for each period that begins at anchor_ms and recurs.
CREATE TABLE recurring_grants (
    tenant       text NOT NULL,
    id           text NOT NULL,
    customer     text NOT NULL,
    amount       bigint NOT NULL CHECK (amount > 0),   -- of each allotment
    category     smallint NOT NULL,
    priority     integer NOT NULL,
    features     text[] NOT NULL,
    recurrence   smallint NOT NULL,
    rollover_max bigint NOT NULL,
    anchor_ms    bigint NOT NULL,
    ends_ms      bigint NOT NULL,          -- no allotment begins at or after it; 0: open
    note         text NOT NULL,
    created_ms   bigint NOT NULL,
    voided_ms    bigint NOT NULL DEFAULT 0,
    next_ms      bigint NOT NULL,          -- when the next allotment to issue begins
    issue_ms     bigint NOT NULL,          -- when it is issued: somewhat before
    contract     text NOT NULL DEFAULT '', -- whose seats it is for
    PRIMARY KEY (tenant, id),
    FOREIGN KEY (tenant, customer) REFERENCES customers (tenant, id)
);
CREATE INDEX recurring_grants_customer ON recurring_grants (tenant, customer);
CREATE INDEX recurring_grants_due ON recurring_grants (issue_ms) WHERE voided_ms = 0;

-- Nanos that a meter's units came to, beside the units.
ALTER TABLE meters ADD COLUMN amount bigint NOT NULL DEFAULT 0;

-- Page turns that the journal has told, until their invoices are made.
CREATE TABLE ended_periods (
    tenant       text NOT NULL,
    customer     text NOT NULL,
    period_start bigint NOT NULL,
    period_end   bigint NOT NULL,          -- 0: it had no end of its own; the next began at next_start
    next_start   bigint NOT NULL,
    overage      bigint NOT NULL,          -- closed into the receivable
    epoch        bigint NOT NULL,
    sequence     bigint NOT NULL,          -- of the journal record
    PRIMARY KEY (tenant, customer, epoch, sequence)
);

CREATE TABLE invoices (
    tenant       text NOT NULL,
    id           text NOT NULL,
    customer     text NOT NULL,
    status       smallint NOT NULL,        -- Invoice.Status: FINAL or VOID; a draft is never stored
    period_start bigint NOT NULL,
    period_end   bigint NOT NULL,
    body         bytea NOT NULL,           -- entitlement.v1.Invoice, as it was made final
    parts        jsonb NOT NULL,           -- what it took from the meters: [period_start, meter, quantity, amount], ...
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    voided_at    timestamptz,
    void_reason  text NOT NULL DEFAULT '',
    PRIMARY KEY (tenant, id)
);
CREATE INDEX invoices_customer ON invoices (tenant, customer, period_start);

-- Projection: what final invoices have taken of each meter. What a meter has beyond it goes to the next invoice.
CREATE TABLE invoiced (
    tenant       text NOT NULL,
    customer     text NOT NULL,
    period_start bigint NOT NULL,
    meter        text NOT NULL,
    quantity     bigint NOT NULL,
    amount       bigint NOT NULL,
    PRIMARY KEY (tenant, customer, period_start, meter)
);

-- Later versions of a usage event: re-rated, or taken back. The last one (highest no) is how it is booked.
CREATE TABLE corrections (
    tenant          text NOT NULL,
    idempotency_key text NOT NULL,         -- of the usage event
    no              integer NOT NULL,
    customer        text NOT NULL,
    cause           text NOT NULL,         -- 'rerate:<key>', 'revert:<backfill>'
    period_start    bigint NOT NULL,
    amount          bigint NOT NULL,       -- of the event from now on
    difference      bigint NOT NULL,       -- to what it was
    record          bytea NOT NULL,        -- the journal record, as it is booked now
    reversal        bigint REFERENCES transactions (id),
    rebooking       bigint REFERENCES transactions (id),
    created_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, idempotency_key, no)
);
CREATE UNIQUE INDEX corrections_cause ON corrections (tenant, cause, idempotency_key);
CREATE INDEX corrections_customer ON corrections (tenant, customer);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON corrections
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE backfills (
    tenant     text NOT NULL,
    id         text NOT NULL,
    status     smallint NOT NULL,          -- Backfill.Status
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    closed_at  timestamptz,
    PRIMARY KEY (tenant, id)
);

-- Events that wait for their backfill to be closed, and what became of them.
CREATE TABLE backfill_events (
    tenant          text NOT NULL,
    backfill        text NOT NULL,
    idempotency_key text NOT NULL,
    event           bytea NOT NULL,        -- entitlement.v1.CheckAndConsumeRequest
    outcome         text NOT NULL DEFAULT '',  -- '' waiting, 'recorded', 'duplicate', else why it was rejected
    PRIMARY KEY (tenant, backfill, idempotency_key),
    FOREIGN KEY (tenant, backfill) REFERENCES backfills (tenant, id)
);

-- Top-ups that a contract's rule has decided, numbered for each customer.
CREATE TABLE top_ups (
    tenant     text NOT NULL,
    customer   text NOT NULL,
    no         integer NOT NULL,
    grant_id   text NOT NULL,
    amount     bigint NOT NULL,
    decided_ms bigint NOT NULL,
    PRIMARY KEY (tenant, customer, no)
);

-- Of each customer the last time that a closed gate was announced: in which cycle, and after which ledger change.
CREATE TABLE gate_denials (
    tenant       text NOT NULL,
    customer     text NOT NULL,
    period_start bigint NOT NULL,
    version      bigint NOT NULL,
    PRIMARY KEY (tenant, customer)
);

-- Who is told by webhook, of which types of event. Addresses and secrets are settings, never rows.
CREATE TABLE webhook_endpoints (
    name  text PRIMARY KEY,
    types text[] NOT NULL
);

CREATE TABLE webhook_deliveries (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    endpoint   text NOT NULL,
    event_id   text NOT NULL,
    tenant     text NOT NULL,
    customer   text NOT NULL,
    type       text NOT NULL,
    body       bytea NOT NULL,
    attempts   integer NOT NULL DEFAULT 0,
    next_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    failed_at  timestamptz,                -- given up: a dead letter
    error      text NOT NULL DEFAULT '',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (next_at) WHERE failed_at IS NULL;
