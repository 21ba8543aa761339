"""A catalogue file: what it means, what is wrong with it and where, and what an apply changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from entitlement.v1 import ledger_pb2 as pb
from gateway.cli.catalogue import Catalogue
from gateway.cli.catalogue_file import read_catalogue
from gateway.cli.difference import difference
from gateway.cli.trace import FEATURE, MODELS, customer_id
from gateway.cli.yaml_source import BadFile

EXAMPLE = Path(__file__).parents[2] / "examples" / "llm.yaml"

WHOLE = """
features:
  - {key: tokens, kind: metered, unit: token}
  - {key: region, kind: static, value: eu-west, shadow: true}
rate_cards:
  - id: llm
    credit_type: USD
    effective_at: 2025-01-31T12:00:00+02:00
    rates:
      - {feature: tokens, match: {model: m-1, token_type: input}, price: "3.00", per: 1000000}
      - {feature: tokens, price: 0.000000001}
customers:
  - {id: acme, name: Acme Inc., status: suspended, subjects: [key-2, key-1]}
contracts:
  - id: acme-1
    customer: acme
    rate_card: llm
    billing: arrears
    allowance: "12.50"
    thresholds: [100, 50]
    quotas: [{feature: tokens, limit: 1000, period: day, soft: true}]
    entitled_features: [tokens]
grants:
  - {id: g-1, customer: acme, amount: 20, category: promotional, priority: 5, expires_at: 2030-01-01}
"""


def read(text: str) -> Catalogue:
    return read_catalogue("c.yaml", text.encode())


def faults(text: str) -> list[str]:
    with pytest.raises(BadFile) as bad:
        read(text)
    return str(bad.value).splitlines()


def test_a_whole_file_becomes_the_messages_it_stands_for() -> None:
    catalogue = read(WHOLE)
    tokens, region = (item.message for item in catalogue.features)
    assert tokens == pb.Feature(key="tokens", kind=pb.Feature.METERED, unit="token")
    assert region == pb.Feature(key="region", kind=pb.Feature.STATIC, value="eu-west", shadow=True)
    (card,) = (item.message for item in catalogue.rate_cards)
    assert card.effective_at.ToJsonString() == "2025-01-31T10:00:00Z"
    assert (card.rates[0].tiers[0].price_nanos, card.rates[0].per) == (3_000_000_000, 1_000_000)
    assert dict(card.rates[0].match) == {"model": "m-1", "token_type": "input"}
    assert (card.rates[1].tiers[0].price_nanos, card.rates[1].per) == (1, 1)
    (customer,) = (item.message for item in catalogue.customers)
    assert (customer.name, customer.status) == ("Acme Inc.", pb.Customer.SUSPENDED)
    assert [subject.id for subject in customer.subjects] == ["key-1", "key-2"]
    (contract,) = (item.message for item in catalogue.contracts)
    assert (contract.billing, contract.gate_percent) == (pb.Contract.ARREARS, 150)
    assert contract.allowance_nanos == 12_500_000_000
    assert [threshold.percent for threshold in contract.thresholds] == [50, 100]
    assert list(contract.quotas) == [pb.QuotaLimit(feature="tokens", limit=1000, period=pb.DAY, soft=True)]
    assert contract.period == pb.MONTH and not contract.HasField("effective_at")
    (grant,) = (item.message for item in catalogue.grants)
    assert (grant.amount_nanos, grant.category, grant.priority) == (20_000_000_000, pb.Grant.PROMOTIONAL, 5)
    assert grant.expires_at.ToJsonString() == "2030-01-01T00:00:00Z"


def test_a_range_makes_customers_with_a_contract_and_grants_of_their_own() -> None:
    catalogue = read(
        """
customers:
  - range: {prefix: cust-, from: 9, to: 11, width: 4}
    name: one of many
    contract: {rate_card: llm}
    grants:
      - {id: paid, amount: "1.5"}
      - {id: promo, amount: "2", category: promotional}
"""
    )
    assert [item.id for item in catalogue.customers] == ["cust-0009", "cust-0010", "cust-0011"]
    assert [(item.id, item.message.customer) for item in catalogue.contracts] == [
        ("cust-0009-contract", "cust-0009"),
        ("cust-0010-contract", "cust-0010"),
        ("cust-0011-contract", "cust-0011"),
    ]
    assert [item.id for item in catalogue.grants][:2] == ["cust-0009-paid", "cust-0009-promo"]
    assert sum(item.message.amount_nanos for item in catalogue.grants) == 3 * 3_500_000_000


def test_aliases_and_merged_fields_may_be_used() -> None:
    catalogue = read(
        """
customers:
  - {id: a, contract: &standard {rate_card: llm, billing: trial}}
  - {id: b, contract: *standard}
  - {id: c, contract: {<<: *standard, billing: prepaid, id: mine}}
"""
    )
    a, b, c = (item.message for item in catalogue.contracts)
    assert (a.billing, b.billing, c.billing) == (pb.Contract.TRIAL, pb.Contract.TRIAL, pb.Contract.PREPAID)
    assert (a.rate_card, b.rate_card, c.rate_card) == ("llm", "llm", "llm")
    assert c.id == "c-mine"


CARD = "rate_cards:\n  - id: llm\n    credit_type: USD\n    rates:\n      - {feature: tokens, "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            CARD + "prise: 3}\n",
            "c.yaml:5: rate_cards[0].rates[0].prise: found an unknown field, "
            "expected one of feature, match, model, price, per, tiers (did you mean 'price'?)",
        ),
        (
            CARD + 'price: "3.0000000001"}\n',
            "c.yaml:5: rate_cards[0].rates[0].price: found '3.0000000001', "
            'expected a decimal amount such as "12.50", not negative, with at most 9 decimals',
        ),
        (
            CARD + "price: 3, per: 1e6}\n",
            "c.yaml:5: rate_cards[0].rates[0].per: found '1e6', expected a whole number from 1 to 1000000000",
        ),
        (
            CARD + "price: 3, match: {model: 'a b'}}\n",
            "c.yaml:5: rate_cards[0].rates[0].match.model: found 'a b', expected 1..128 of A-Z a-z 0-9 . _ ~ @ / + -",
        ),
        (
            "features:\n  - key: tokens\n    kind: metred\n",
            "c.yaml:3: features[0].kind: found 'metred', "
            "expected one of metered, boolean, static (did you mean 'metered'?)",
        ),
        ("feature: []\n", "c.yaml:1: feature: found an unknown field, expected one of features, rate_cards, "),
        ("features: 7\n", "c.yaml:1: features: found '7', expected a list"),
        ("features:\n  - tokens\n", "c.yaml:2: features[0]: found 'tokens', expected fields (name: value)"),
        ("features:\n  - {}\n", "c.yaml:2: features[0].key: found nothing, expected this field: it is required"),
        ("features:\n  - key:\n", "c.yaml:2: features[0].key: found nothing, expected a name: 1..64"),
        (
            "features:\n  - {key: a}\n  - {key: a}\n",
            "c.yaml:3: features[1].key: found the feature 'a' again, expected it once (it is on line 2 too)",
        ),
        (
            "features:\n  - key: a\n    key: b\n",
            "c.yaml:3: features[0].key: found the field twice, expected it once (it is on line 2 too)",
        ),
        (
            "features:\n  - {key: a, shadow: yes}\n",
            "c.yaml:2: features[0].shadow: found 'yes', expected one of false, true",
        ),
        (
            "features:\n  - {key: a, value: x}\n",
            "c.yaml:2: features[0].value: found 'x', expected no value: only a static",
        ),
        ("customers:\n  - {name: x}\n", "c.yaml:2: customers[0]: found neither id nor range, expected one of them"),
        (
            "customers:\n  - id: 'a b'\n",
            "c.yaml:2: customers[0].id: found 'a b', expected an id: 1..128 of A-Z a-z 0-9 . _ ~ @ / + = -",
        ),
        (
            "customers:\n  - range: {prefix: c-, from: 5, to: 1}\n",
            "c.yaml:2: customers[0].range.to: found '1', expected a number from 5 to 100004",
        ),
        (
            "customers:\n  - id: a\n    contract: {rate_card: llm, allowance: 5}\n",
            "c.yaml:3: customers[0].contract.allowance: found a credit line, expected billing: arrears with it, "
            "or a grant instead",
        ),
        (
            "customers:\n  - id: a\n    grants: [{id: g, amount: 0}]\n",
            "c.yaml:3: customers[0].grants[0].amount: found '0', expected an amount above zero",
        ),
        (
            "contracts:\n  - {id: c, customer: a, rate_card: llm, thresholds: [80, 1001]}\n",
            "c.yaml:2: contracts[0].thresholds[1]: found '1001', expected a whole number from 1 to 1000",
        ),
        (
            "contracts:\n  - {id: c, customer: a, rate_card: llm, effective_at: 2025-01-01T00:00:00}\n",
            "c.yaml:2: contracts[0].effective_at: found '2025-01-01T00:00:00', expected a time with its zone, ",
        ),
        (
            "grants:\n  - {id: g, customer: a, amount: -1}\n",
            "c.yaml:2: grants[0].amount: found '-1', expected a decimal amount such as",
        ),
        ("a: [1,\n b: {", "c.yaml:2: found a syntax error (expected the node content"),
        ("", "c.yaml:1: found an empty file, expected a catalogue"),
        ("[" * 100_000, "c.yaml:1: found too many levels, expected a catalogue"),
        ("a: \x00", "c.yaml:1: found what is not text (special characters are not allowed), expected YAML in UTF-8"),
    ],
)
def test_a_fault_is_named_by_line_field_found_and_expected(text: str, expected: str) -> None:
    assert faults(text)[0].startswith(expected)


def test_all_faults_of_a_file_are_told_at_once_in_the_order_of_its_lines() -> None:
    told = faults("grants:\n  - {id: g}\nfeatures:\n  - {key: A}\n  - {key: b}\n  - {kind: x}\n")
    assert [line.split(" ")[0] for line in told] == ["c.yaml:2:", "c.yaml:4:", "c.yaml:6:"]


@pytest.mark.parametrize("text", ["3.0", "0.000000001", "9223372036.854775807", "0", "12.50"])
def test_amounts_are_exact_quoted_or_not(text: str) -> None:
    whole, _, fraction = text.partition(".")
    exact = int(whole) * 10**9 + int(fraction.ljust(9, "0") or "0")
    for written in (text, f'"{text}"'):
        catalogue = read(f"contracts: [{{id: c, customer: a, rate_card: r, billing: arrears, allowance: {written}}}]\n")
        assert catalogue.contracts[0].message.allowance_nanos == exact


TIERED = "features: [{key: tokens}]\nrate_cards: [{id: r, credit_type: USD, rates: [{feature: tokens, %s}]}]"


def test_every_model_has_its_prices_where_they_belong() -> None:
    (card,) = read(
        TIERED % 'model: volume, per: 10, tiers: [{up_to: 5, price: "2"}, {price: "1", flat: "0.5"}]'
    ).rate_cards
    assert card.message.rates[0] == pb.Rate(
        feature="tokens",
        model=pb.Rate.VOLUME,
        per=10,
        tiers=[
            pb.Tier(up_to=5, price_nanos=2_000_000_000),
            pb.Tier(price_nanos=1_000_000_000, flat_nanos=500_000_000),
        ],
    )
    (card,) = read(TIERED % 'model: package, per: 10, price: "2"').rate_cards
    assert card.message.rates[0].tiers == [pb.Tier(price_nanos=2_000_000_000)]


@pytest.mark.parametrize(
    ("rate", "problem"),
    [
        ("model: graduated, price: 1", "a price, expected tiers"),
        ("model: graduated", "nothing, expected this field"),
        ("model: graduated, tiers: []", "1..20 tiers"),
        ("price: 1, tiers: [{price: 1}]", "tiers, expected a price"),
        ("model: volume, tiers: [{up_to: 5, price: 1}]", "no up_to: the last tier has no end"),
        ("model: volume, tiers: [{price: 1}, {price: 1}]", "up_to: only the last tier has no end"),
        ("model: volume, tiers: [{up_to: 5, price: 1}, {up_to: 5, price: 1}, {price: 1}]", "found '5', expected"),
        ("model: volume, tiers: [{price: -1}]", "found '-1', expected"),
        ("model: volume, tiers: [{price: 1, flat: 1000001}]", "found '1000001', expected"),
    ],
)
def test_tiers_that_do_not_add_up_are_refused(rate: str, problem: str) -> None:
    assert any(problem in fault for fault in faults(TIERED % rate))


def test_the_example_prices_every_model_of_the_replay_and_has_its_customers() -> None:
    catalogue = read_catalogue(str(EXAMPLE), EXAMPLE.read_bytes())
    (card,) = (item.message for item in catalogue.rate_cards)
    priced = {(rate.feature, rate.match["model"], rate.match["token_type"]) for rate in card.rates}
    assert priced == {(FEATURE, model, kind) for model in MODELS for kind in ("input", "output")}
    customers = [customer_id(rank) for rank in range(1, 51)]
    assert [item.id for item in catalogue.customers] == customers
    assert [item.message.customer for item in catalogue.contracts] == customers
    billing = {item.message.billing for item in catalogue.contracts}
    assert billing == {pb.Contract.PREPAID, pb.Contract.ARREARS, pb.Contract.TRIAL}


def test_nothing_differs_from_what_the_server_made_of_the_same_entry() -> None:
    catalogue = read(WHOLE)
    card = pb.RateCard()
    card.CopyFrom(catalogue.rate_cards[0].message)
    card.version = "3"
    assert difference(catalogue.rate_cards[0].message, card) == ""
    grant = pb.Grant()
    grant.CopyFrom(catalogue.grants[0].message)
    grant.remaining_nanos = 5
    grant.effective_at.FromSeconds(1_700_000_000)
    assert difference(catalogue.grants[0].message, grant) == ""


def test_a_difference_says_before_and_after() -> None:
    catalogue = read(WHOLE)
    card, wanted = pb.RateCard(), catalogue.rate_cards[0].message
    card.CopyFrom(wanted)
    card.rates[0].tiers[0].price_nanos = 2_500_000_000
    del card.rates[1]
    assert difference(wanted, card) == (
        "tokens model=m-1,token_type=input 2.5 per 1000000 → 3 per 1000000, tokens - → 0.000000001 per 1"
    )
    customer = pb.Customer(id="acme", name="Acme", status=pb.Customer.ACTIVE)
    assert difference(catalogue.customers[0].message, customer) == (
        "name Acme → Acme Inc., status ACTIVE → SUSPENDED, subjects - → key-1,key-2"
    )
    card.CopyFrom(wanted)
    card.rates.reverse()
    assert difference(wanted, card) == "the order of its rates"
