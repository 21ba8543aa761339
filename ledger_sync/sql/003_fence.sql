-- Which hot store the ledger has vouched for (entitlement/opening.py), and the name of the deployment, which both its
-- hot store and the gateways' receipts carry, so that none is ever taken for another's.
--
-- `number` counts up with each hot store that is another one than before, or has been emptied. Whoever settles journal
-- records holds the row FOR SHARE with the number under which they were read: what was read from a hot store that has
-- been given up is not settled any more.
CREATE TABLE fence (
    one        boolean PRIMARY KEY DEFAULT true CHECK (one),
    deployment text NOT NULL DEFAULT replace(gen_random_uuid()::text, '-', ''),
    number     bigint NOT NULL DEFAULT 0,
    run_id     text NOT NULL DEFAULT '',
    replid     text NOT NULL DEFAULT '',
    open       boolean NOT NULL DEFAULT false,
    changed_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
INSERT INTO fence DEFAULT VALUES;

-- The most that a gateway may grant while the hot store is away (failure_policy CONTINUE); 0: nothing.
ALTER TABLE contracts ADD COLUMN continues bigint NOT NULL DEFAULT 0;
CREATE INDEX contracts_continuing ON contracts (tenant, customer) WHERE state = 1 AND continues > 0;

-- What a grant of the feature rests on (Feature.Durability); 0: as the gateway is set.
ALTER TABLE features ADD COLUMN durability smallint NOT NULL DEFAULT 0;
