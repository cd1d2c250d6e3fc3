"""Probes run side by side, and none hides another."""

import threading

from sprue.operations.findings import Finding, Probe, run_probes


def test_findings_come_in_order_and_a_late_or_broken_probe_is_one():
    never = threading.Event()

    def breaks():
        raise ValueError("words\nmore words")

    found = run_probes(
        [
            Probe("late", lambda: never.wait() and [], late="WARN"),
            Probe("good", lambda: [Finding("OK", "good", "1"), Finding("OK", "good", "2")]),
            Probe("broken", breaks),
            Probe("silent", list),
        ],
        deadline_s=0.3,
    )
    assert found == [
        Finding("WARN", "late", "no answer within 0.3 s"),
        Finding("OK", "good", "1"),
        Finding("OK", "good", "2"),
        Finding("FAIL", "broken", "ValueError: words"),
    ]
    assert str(found[0]) == "WARN  late       no answer within 0.3 s"
