-- The transaction that wrote what an event of the outbox tells: by it Verify knows which events cannot have left yet
-- (ledger_sync/completeness.py). NULL in rows from before: those are not looked at. No row is rewritten.
ALTER TABLE usage_events ADD COLUMN txid xid8;
ALTER TABLE usage_events ALTER COLUMN txid SET DEFAULT pg_current_xact_id();
ALTER TABLE corrections ADD COLUMN txid xid8;
ALTER TABLE corrections ALTER COLUMN txid SET DEFAULT pg_current_xact_id();
ALTER TABLE invoices ADD COLUMN txid xid8;
ALTER TABLE invoices ALTER COLUMN txid SET DEFAULT pg_current_xact_id();
ALTER TABLE top_ups ADD COLUMN txid xid8;
ALTER TABLE top_ups ALTER COLUMN txid SET DEFAULT pg_current_xact_id();
