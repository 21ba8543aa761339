-- The authoritative ledger. Amounts are bigint nanos (1e-9 of a credit type), quantities bigint units; never a float.
--
-- What happened is append-only: transactions, entries, usage_events, rate_cards (versions), audit. Triggers refuse UPDATE, DELETE and
-- TRUNCATE there for every role, and each statement's entries must sum to zero per transaction. What follows from it
-- (accounts, grant_balances, account_periods, meters) is a projection, kept in the same transaction and checked by Verify.
--
-- Names of entry accounts: 'grant:<grant id>' a customer's credit, 'overage:<customer>' use beyond it,
-- 'revenue:<feature>', 'issued:<category>' where grants come from, 'breakage' paid units that ended unused,
-- 'receivable:<customer>' overage that went to an invoice.

CREATE TABLE features (
    tenant      text NOT NULL,
    key         text NOT NULL,
    kind        smallint NOT NULL,
    unit        text NOT NULL,
    shadow      boolean NOT NULL,
    value       text NOT NULL,
    PRIMARY KEY (tenant, key)
);

CREATE TABLE rate_cards (
    tenant       text NOT NULL,
    id           text NOT NULL,
    version      bigint NOT NULL CHECK (version > 0),
    effective_ms bigint NOT NULL,
    credit_type  text NOT NULL,
    rates        jsonb NOT NULL,           -- entitlement.rating.Rate, as msgspec writes it
    created_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, id, version)
);

-- Counts up with every change of a tenant's features or rate cards; 'generation' of the published snapshot.
CREATE TABLE catalogs (
    tenant      text PRIMARY KEY,
    generation  bigint NOT NULL
);

CREATE TABLE customers (
    tenant      text NOT NULL,
    id          text NOT NULL,
    name        text NOT NULL,
    status      smallint NOT NULL,         -- Customer.Status
    subjects    jsonb NOT NULL DEFAULT '[]',
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, id)
);

CREATE TABLE contracts (
    tenant       text NOT NULL,
    id           text NOT NULL,
    customer     text NOT NULL,
    body         bytea NOT NULL,           -- entitlement.v1.Contract, as it was put (with defaults filled in)
    effective_ms bigint NOT NULL,
    ends_ms      bigint NOT NULL,          -- 0: open
    updated_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, id),
    FOREIGN KEY (tenant, customer) REFERENCES customers (tenant, id)
);
CREATE INDEX contracts_customer ON contracts (tenant, customer);

-- One row a customer that has a contract: the ledger's side of the hot account. The row's lock orders everything that
-- concerns the account: postings, installs and ledger changes.
CREATE TABLE accounts (
    tenant       text NOT NULL,
    customer     text NOT NULL,
    partition    smallint NOT NULL,
    credit_type  text NOT NULL,
    config       text NOT NULL,            -- entitlement.account.Config.encode(), as of `version`
    epoch        bigint NOT NULL DEFAULT 0,     -- of the last install; 0 = never in the hot store
    sequence     bigint NOT NULL DEFAULT 0,     -- last journal record that is settled here
    version      bigint NOT NULL DEFAULT 0,     -- last ledger change decided here
    applied      bigint NOT NULL DEFAULT 0,     -- last ledger change that the journal (or an install) has confirmed
    overage      bigint NOT NULL DEFAULT 0,
    held         bigint NOT NULL DEFAULT 0,
    period_start bigint NOT NULL DEFAULT 0,
    period_end   bigint NOT NULL DEFAULT 0,
    allowance    bigint NOT NULL DEFAULT 0,
    crossed      text NOT NULL DEFAULT '-',
    crossings    integer NOT NULL DEFAULT 0,
    gaps         integer NOT NULL DEFAULT 0,    -- holes ever seen in the sequence: each is an alarm
    PRIMARY KEY (tenant, customer),
    FOREIGN KEY (tenant, customer) REFERENCES customers (tenant, id)
) WITH (fillfactor = 60);                  -- projections are updated in place, and leave room for it
CREATE INDEX accounts_partition ON accounts (partition);

CREATE TABLE grants (
    no           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant       text NOT NULL,
    id           text NOT NULL,
    customer     text NOT NULL,
    amount       bigint NOT NULL CHECK (amount > 0),
    category     smallint NOT NULL,
    priority     integer NOT NULL,
    effective_ms bigint NOT NULL,
    expires_ms   bigint NOT NULL,          -- 0: never
    features     text[] NOT NULL,          -- empty: all
    recurrence   smallint NOT NULL DEFAULT 1,
    rollover_max bigint NOT NULL DEFAULT 0,
    note         text NOT NULL,
    created_ms   bigint NOT NULL,
    voided_ms    bigint NOT NULL DEFAULT 0,
    UNIQUE (tenant, id),
    FOREIGN KEY (tenant, customer) REFERENCES customers (tenant, id)
);
CREATE INDEX grants_customer ON grants (tenant, customer);

-- Projection: what is left of each grant. A row for every grant.
CREATE TABLE grant_balances (
    grant_no   bigint PRIMARY KEY REFERENCES grants (no),
    remaining  bigint NOT NULL
) WITH (fillfactor = 60);

-- Projection: what each period of an account has settled.
CREATE TABLE account_periods (
    tenant       text NOT NULL,
    customer     text NOT NULL,
    period_start bigint NOT NULL,
    settled      bigint NOT NULL,
    PRIMARY KEY (tenant, customer, period_start)
) WITH (fillfactor = 60);

-- Projection: cumulative units of each meter in each period.
CREATE TABLE meters (
    tenant       text NOT NULL,
    customer     text NOT NULL,
    period_start bigint NOT NULL,
    meter        text NOT NULL,
    quantity     bigint NOT NULL,
    PRIMARY KEY (tenant, customer, period_start, meter)
) WITH (fillfactor = 60);

CREATE TABLE transactions (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant          text NOT NULL,
    customer        text NOT NULL,
    kind            text NOT NULL,         -- consume, grant, void, expire, repay, reclass, close, adjust, reverse
    idempotency_key text NOT NULL,         -- of the event, grant or change that it books; with its kind unique
    event_time      timestamptz NOT NULL,
    recorded_at     timestamptz NOT NULL,
    epoch           bigint NOT NULL,
    sequence        bigint NOT NULL,       -- the journal record that it books; 0: decided in the ledger
    version         bigint NOT NULL DEFAULT 0,  -- the ledger change that it books
    reverses        bigint REFERENCES transactions (id),
    note            text NOT NULL DEFAULT ''
);
CREATE INDEX transactions_account ON transactions (tenant, customer, id);
-- A consumption's key is unique in usage_events, which names its transaction.
CREATE UNIQUE INDEX transactions_key ON transactions (tenant, idempotency_key, kind) WHERE kind <> 'consume';
CREATE INDEX transactions_reverses ON transactions (reverses) WHERE reverses IS NOT NULL;

CREATE TABLE entries (
    transaction_id bigint NOT NULL,        -- of transactions; checked by the trigger below, for a whole statement at once
    line           smallint NOT NULL,
    account        text NOT NULL,
    grant_no       bigint,
    amount         bigint NOT NULL CHECK (amount <> 0),
    credit_type    text NOT NULL,
    PRIMARY KEY (transaction_id, line)
);
CREATE INDEX entries_grant ON entries (grant_no) WHERE grant_no IS NOT NULL;

-- One row an event, for ever: the second memory of idempotency.
CREATE TABLE usage_events (
    tenant          text NOT NULL,
    idempotency_key text NOT NULL,
    customer        text NOT NULL,
    subject         text NOT NULL,
    fingerprint     bytea NOT NULL,
    event_time      timestamptz NOT NULL,
    recorded_at     timestamptz NOT NULL,
    period_start    bigint NOT NULL,
    epoch           bigint NOT NULL,
    sequence        bigint NOT NULL,
    amount          bigint NOT NULL,
    credit_type     text NOT NULL,
    rate_card       text NOT NULL,
    rate_version    text NOT NULL,
    record          bytea NOT NULL,        -- the journal record, whole: decision and request
    transaction_id  bigint,                -- NULL when its amount is 0
    PRIMARY KEY (tenant, idempotency_key)
);
CREATE INDEX usage_events_customer ON usage_events (tenant, customer, event_time);

-- Ledger changes on their way to the hot store. body: entitlement deltas as JSON (ledger_sync.hot_deltas.Delta).
CREATE TABLE hot_deltas (
    tenant     text NOT NULL,
    customer   text NOT NULL,
    version    bigint NOT NULL,
    body       bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant, customer, version)
);

-- Events to publish, in commit order: readers go by (txid, id) below the oldest running transaction, never by id alone.
CREATE TABLE outbox (
    id         bigint GENERATED ALWAYS AS IDENTITY,
    txid       xid8 NOT NULL DEFAULT pg_current_xact_id(),
    event_id   text NOT NULL,
    tenant     text NOT NULL,
    customer   text NOT NULL,
    type       text NOT NULL,
    body       bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (txid, id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 100000);  -- rows come and go

CREATE TABLE outbox_cursor (
    publisher  text PRIMARY KEY,
    txid       xid8 NOT NULL,
    id         bigint NOT NULL,
    published  bigint NOT NULL DEFAULT 0
);

-- Records that could not be posted, whole, with the reason. Never dropped by itself.
CREATE TABLE quarantine (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stream      text NOT NULL,
    entry_id    text NOT NULL,
    reason      text NOT NULL,
    record      bytea NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    resolved_at timestamptz,
    resolution  text NOT NULL DEFAULT '',
    UNIQUE (stream, entry_id)
);

CREATE TABLE audit (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    tenant     text NOT NULL,
    actor      text NOT NULL,
    action     text NOT NULL,
    subject    text NOT NULL,
    outcome    text NOT NULL,
    detail     text NOT NULL DEFAULT ''
);

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% on % is refused: the ledger is append-only, corrections are new entries', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END $$;

-- Every transaction that a statement adds entries to exists, and its new entries sum to zero. In place of a foreign key,
-- which would look up each entry on its own. The plan is kept from when the ledger is small: it must go by the index.
CREATE FUNCTION refuse_unbalanced() RETURNS trigger LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    bad record;
BEGIN
    SELECT f.id, f.total INTO bad
    FROM (SELECT transaction_id AS id, sum(amount) AS total FROM fresh GROUP BY transaction_id, credit_type) f
    WHERE f.total <> 0 OR (SELECT t.id FROM transactions t WHERE t.id = f.id) IS NULL LIMIT 1;
    IF FOUND AND bad.total <> 0 THEN
        RAISE EXCEPTION 'transaction % does not sum to zero', bad.id USING ERRCODE = 'check_violation';
    ELSIF FOUND THEN
        RAISE EXCEPTION 'transaction % does not exist', bad.id USING ERRCODE = 'foreign_key_violation';
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER entries_balanced AFTER INSERT ON entries REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_unbalanced();

DO $$
DECLARE
    name text;
BEGIN
    FOREACH name IN ARRAY ARRAY['transactions', 'entries', 'usage_events', 'rate_cards', 'audit'] LOOP
        EXECUTE format('CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON %I
                        FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()', name);
    END LOOP;
END $$;
