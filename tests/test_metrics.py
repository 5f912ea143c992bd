import threading

import pytest

from kvengine.metrics import SERIES, TABLE, Metrics

# Dashboards and alerts are built on these: a change here is a change for every user.
FROZEN = {
    "kvengine_lookup_blocks_total": ("counter", ()),
    "kvengine_hit_blocks_total": ("counter", ("tier",)),
    "kvengine_saved_blocks_total": ("counter", ()),
    "kvengine_save_refused_blocks_total": ("counter", ()),
    "kvengine_overfull_blocks_total": ("counter", ()),
    "kvengine_evicted_blocks_total": ("counter", ("reason",)),
    "kvengine_corrupt_blocks_total": ("counter", ("tier",)),
    "kvengine_tier_failures_total": ("counter", ("tier",)),
    "kvengine_op_seconds": ("histogram", ("op", "tier")),
    "kvengine_bytes": ("gauge", ("tier",)),
    "kvengine_blocks": ("gauge", ("tier",)),
    "kvengine_demoted_blocks_total": ("counter", ("tier",)),
    "kvengine_write_skipped_blocks_total": ("counter", ("tier",)),
    "kvengine_unreadable_blocks_total": ("counter", ("tier",)),
    "kvengine_fetched_blocks_total": ("counter", ("tier",)),
    "kvengine_saved_prefill_seconds_total": ("counter", ()),
    "kvengine_hint_unknown_blocks_total": ("counter", ()),
    "kvengine_plan_decisions_total": ("counter", ("reason",)),
    "kvengine_incomplete_blocks_total": ("counter", ("reason",)),
    "kvengine_shadow_lookup_blocks_total": ("counter", ()),
    "kvengine_shadow_missed_blocks_total": ("counter", ("policy",)),
    "kvengine_shadow_missed_prefill_seconds_total": ("counter", ("policy",)),
    "kvengine_dropped_blocks_total": ("counter", ()),
    "kvengine_expired_total": ("counter", ("kind",)),
    "kvengine_pinned_bytes": ("gauge", ()),
    "kvengine_pin_failures_total": ("counter", ()),
    "kvengine_adapter_errors_total": ("counter", ("adapter",)),
}


def test_names_kinds_and_labels_are_frozen():
    assert {row.name: (row.kind, row.labels) for row in TABLE} == FROZEN
    assert len(SERIES) == len(TABLE)
    assert all(row.help for row in TABLE)


def test_counter_adds_by_label():
    metrics = Metrics()
    metrics.add("hit_blocks", 3, tier="memory")
    metrics.add("hit_blocks", 4, tier="disk")
    metrics.add("hit_blocks", tier="disk")
    assert metrics.get("hit_blocks", tier="memory") == 3
    assert metrics.get("hit_blocks", tier="disk") == 5
    assert metrics.get("hit_blocks") == 8
    assert metrics.get("saved_blocks") == 0


def test_order_of_labels_does_not_matter():
    metrics = Metrics()
    metrics.add("op_seconds", 0.5, op="load", tier="disk")
    metrics.add("op_seconds", 0.25, tier="disk", op="load")
    assert metrics.get("op_seconds", op="load") == 0.75
    assert metrics.snapshot()['kvengine_op_seconds_count{op="load",tier="disk"}'] == 2


def test_gauge_is_set():
    metrics = Metrics()
    metrics.set("bytes", 10, tier="memory")
    metrics.set("bytes", 7, tier="memory")
    assert metrics.get("bytes", tier="memory") == 7
    assert metrics.snapshot()['kvengine_bytes{tier="memory"}'] == 7


def test_engines_do_not_share_a_registry():
    one, other = Metrics(), Metrics()
    one.add("saved_blocks", 2)
    assert other.get("saved_blocks") == 0


def test_text_has_every_unlabelled_series_and_each_help():
    text = Metrics().text().decode()
    assert "kvengine_saved_blocks_total 0.0" in text
    for row in TABLE:
        assert row.help in text


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.add("hit_block", tier="memory"), "did you mean 'hit_blocks'"),
        (lambda m: m.add("kvengine_hit_blocks_total", tier="x"), "did you mean 'hit_blocks'"),
        (lambda m: m.add("zzz"), "known are lookup_blocks"),
        (lambda m: m.add("hit_blocks"), "has labels tier, not"),
        (lambda m: m.add("saved_blocks", tier="memory"), "has labels none, not tier"),
        (lambda m: m.get("hit_blocks", reason="x"), "has labels tier, not reason"),
        (lambda m: m.add("bytes", 1, tier="memory"), "is a gauge: use set"),
        (lambda m: m.set("saved_blocks", 1), "is a counter: use add"),
        (lambda m: m.set("op_seconds", 1, op="load", tier="disk"), "is a histogram: use add"),
    ],
)
def test_wrong_names_and_labels_are_key_errors(call, says):
    with pytest.raises(KeyError, match=says):
        call(Metrics())


def test_many_threads_lose_no_count():
    metrics = Metrics()

    def bump() -> None:
        for _ in range(2000):
            metrics.add("hit_blocks", tier="memory")

    threads = [threading.Thread(target=bump) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.get("hit_blocks", tier="memory") == 16000
