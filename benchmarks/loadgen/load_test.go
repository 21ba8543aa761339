package main

import (
	"bytes"
	"testing"
)

func TestBucketsAreThoseOfTheTwin(t *testing.T) {
	for value, bucket := range map[int64]int{0: 0, 127: 127, 128: 128, 255: 255, 256: 256, 258: 257} {
		if found := bucketOf(value); found != bucket {
			t.Errorf("bucketOf(%d) = %d, expected %d", value, found, bucket)
		}
	}
}

func TestZipfDrawsTheFirstCustomersAsOftenAsItSays(t *testing.T) {
	const draws = 200_000
	chooser := newChooser(Choice{Count: 100, Zipf: 1}, 7)
	counts := make([]int, 100)
	for range draws {
		counts[chooser.draw()]++
	}
	// The harmonic number of 100 is 5.187: the first has 19.3 %, the second half of that.
	if first, second := float64(counts[0])/draws, float64(counts[1])/draws; first < 0.185 || first > 0.2 || second < 0.09 || second > 0.103 {
		t.Errorf("shares %.3f and %.3f", first, second)
	}
}

func TestASettlementCountsEveryReportThatItCharges(t *testing.T) {
	spec := Spec{ReportMs: 100, ReportUnits: 50, UnitNanos: 3, DeadlineMs: 1_000}
	l := newMeterLane(&spec, 0)
	l.stopAt = now() + 1e12
	m := &metering{stream: &stream{id: 1}, opened: now(), sent: 4, last: 40}
	l.open[1] = m
	l.message(m.stream, appendVarint(appendVarint(nil, meterSignal, 1), meterAcknowledged, 3))
	l.message(m.stream, appendVarint(nil, meterAcknowledged, 3))
	r := &l.result
	if r.Allowed != 1 || r.Decisions != 3 || r.Units != 150 || r.Amount != 450 || r.Latency.Total != 3 || len(r.Failed) != 0 {
		t.Errorf("%+v", r)
	}
	l.stopAt = 0 // No other stream follows.
	l.ended(m.stream, 14)
	if r.Failed["14"] != 1 || r.Unknown != 1 || r.Calls != 0 {
		t.Errorf("%+v", r)
	}
}

func TestInOrderEveryCustomerComesOnce(t *testing.T) {
	chooser := newChooser(Choice{Prefix: "c-", Count: 3, First: 10, Order: true}, 1)
	var names []byte
	for range 4 {
		names = append(chooser.append(names), ' ')
	}
	if string(names) != "c-10 c-11 c-12 c-10 " {
		t.Errorf("%q", names)
	}
}

func TestAReplayIsComparedButForItsMark(t *testing.T) {
	first := []byte{8, 1, 0x4a, 1, 'k'}
	again := []byte{8, 1, 0x28, 1, 0x4a, 1, 'k'}
	plain, err := without(nil, again, responseReplayed)
	if err != nil || !bytes.Equal(plain, first) {
		t.Errorf("%v %v", plain, err)
	}
	a, err := readAnswer(again)
	if err != nil || !a.replayed || a.verdict != 1 || string(a.key) != "k" {
		t.Errorf("%+v %v", a, err)
	}
}

func TestACutAnswerIsAnErrorAndNoPanic(t *testing.T) {
	whole := []byte{8, 1, 0x1a, 2, 0x18, 7, 0x4a, 1, 'k'}
	for size := range whole {
		_, _ = readAnswer(whole[:size])
	}
	if a, err := readAnswer(whole); err != nil || a.amount != 7 {
		t.Errorf("%+v %v", a, err)
	}
}

func TestOnlyThisMachineIsLoaded(t *testing.T) {
	for target, allowed := range map[string]bool{
		"127.0.0.1:80": true, "[::1]:80": true, "unix:/tmp/x": true,
		"10.0.0.1:80": false, "example.com:80": false, "localhost": false, "": false,
	} {
		spec := Spec{Target: target, Count: 1, Seconds: 1, InFlight: 1, Batch: 1, Connections: 1, DeadlineMs: 1}
		if err := spec.check(); (err == nil) != allowed {
			t.Errorf("%q: %v", target, err)
		}
	}
}
