-- works with 006
-- The audit log as a chain (ledger_sync/audit_chain.py): each line is sealed by a hash over it and the seal before it, of
-- its tenant. Sealing comes after the line's own transaction, so that changes do not wait for one another: what waits for
-- its seal is in audit_unsealed. Lines from before are sealed as well, where they stand first.

ALTER TABLE audit ADD COLUMN source text NOT NULL DEFAULT '';  -- where the call came from: an address, or 'unix'

CREATE TABLE audit_seals (
    tenant   text NOT NULL,
    no       bigint NOT NULL,                  -- 1, 2, 3, ...: the order of the chain
    audit_id bigint NOT NULL UNIQUE,           -- of audit; no foreign key: that a line has gone is for Verify to tell
    hash     bytea NOT NULL CHECK (octet_length(hash) = 32),
    PRIMARY KEY (tenant, no)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_seals
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

CREATE TABLE audit_unsealed (
    audit_id bigint PRIMARY KEY,
    tenant   text NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);  -- rows come and go
INSERT INTO audit_unsealed (audit_id, tenant) SELECT id, tenant FROM audit;

CREATE FUNCTION await_seal() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO audit_unsealed (audit_id, tenant) SELECT id, tenant FROM fresh;
    RETURN NULL;
END $$;
CREATE TRIGGER await_seal AFTER INSERT ON audit REFERENCING NEW TABLE AS fresh
    FOR EACH STATEMENT EXECUTE FUNCTION await_seal();
