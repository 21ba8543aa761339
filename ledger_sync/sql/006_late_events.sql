-- Events that were recorded long after they happened: the few whose answers are found by when they were given, not by when
-- they happened (ledger_sync/remembered.py). Of every other event the index on event_time tells. The interval is that of
-- remembered.WINDOW_MS.
CREATE INDEX usage_events_late ON usage_events (tenant, customer, recorded_at)
    WHERE recorded_at - event_time > interval '15 minutes';
