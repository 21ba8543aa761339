-- Holds: units set aside (entitlement/journal.py, kinds 4 to 6). What happened to them is append-only in hold_moves; `holds`
-- and accounts.held follow from it. `amount` of a move is by how much it changed the account's held: 0 for one that
-- came from an earlier install, whose account is gone.
CREATE TABLE hold_moves (
    tenant      text NOT NULL,
    customer    text NOT NULL,
    epoch       bigint NOT NULL,
    sequence    bigint NOT NULL,
    hold        text NOT NULL,
    amount      bigint NOT NULL,
    recorded_at timestamptz NOT NULL,
    record      bytea NOT NULL,            -- the journal's record
    PRIMARY KEY (tenant, customer, epoch, sequence),
    FOREIGN KEY (tenant, customer) REFERENCES accounts (tenant, customer)
);
CREATE INDEX hold_moves_hold ON hold_moves (tenant, customer, hold);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON hold_moves
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE holds (
    tenant     text NOT NULL,
    customer   text NOT NULL,
    id         text NOT NULL,
    state      smallint NOT NULL,          -- 1 held, 2 settled, 3 released, 4 expired
    amount     bigint NOT NULL,            -- nanos set aside in all
    remaining  bigint NOT NULL,            -- of them, still set aside
    expires_ms bigint NOT NULL,
    changed_ms bigint NOT NULL,            -- on the hot store's clock
    epoch      bigint NOT NULL,            -- of the last record that changed it
    sequence   bigint NOT NULL,
    PRIMARY KEY (tenant, customer, id),
    FOREIGN KEY (tenant, customer) REFERENCES accounts (tenant, customer)
) WITH (fillfactor = 70);
CREATE INDEX holds_open ON holds (tenant, customer) WHERE state = 1;
CREATE INDEX holds_ended ON holds (tenant, customer, changed_ms) WHERE state <> 1;
