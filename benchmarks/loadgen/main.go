// Command loadgen sends gRPC calls to a gateway (or packed commands to Redis, or HTTP requests to a proxy) and says what
// became of each.
//
// It is told what to do by one JSON object, its only argument, and answers with one JSON object on its last line. When
// the load is about to begin it prints "begin" and waits for a line on its standard input; when the load has ended it
// prints "end" and waits again: whoever runs it reads the servers' CPU clocks meanwhile.
//
// Every load is bounded in count and in time, and goes to this machine only: a loopback address or a Unix socket.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// Spec is what to do. Times are in the unit that their name says.
type Spec struct {
	Target      string  `json:"target"` // host:port or unix:/path
	Mode        string  `json:"mode"`   // unary, batch, stream, plan, resp, http, meter
	Path        string  `json:"path"`   // of the method
	Open        bool    `json:"open"`   // calls come when they come, whatever the answers do
	Poisson     bool    `json:"poisson"`
	Rate        float64 `json:"rate"`      // open: calls a second
	InFlight    int     `json:"in_flight"` // closed: so many at any time; open: at most so many, else a call is skipped
	Batch       int     `json:"batch"`     // requests in a call; resp: commands in a write
	Connections int     `json:"connections"`
	Count       int     `json:"count"`   // decisions, at most
	Seconds     float64 `json:"seconds"` // at most
	DeadlineMs  int     `json:"deadline_ms"`
	Run         string  `json:"run"` // in every key: no other run has it
	Seed        int64   `json:"seed"`
	Customers   Choice  `json:"customers"`
	Poor        Choice  `json:"poor"`       // customers without credit
	PoorShare   float64 `json:"poor_share"` // of the requests
	Feature     string  `json:"feature"`
	Replays     int     `json:"replays"` // answers to ask for again afterwards
	File        string  `json:"file"`    // plan: due times and requests; resp: commands
	Speed       float64 `json:"speed"`   // plan: so many times as fast
	Opaque      bool    `json:"opaque"`  // answers have no content to look at

	// meter: in_flight is streams
	StreamMs    int               `json:"stream_ms"` // how long one reports
	ReportMs    int               `json:"report_ms"` // from one report to the next
	ReportUnits int               `json:"report_units"`
	HoldUnits   int               `json:"hold_units"`
	UnitNanos   int64             `json:"unit_nanos"` // the price
	Dimensions  map[string]string `json:"dimensions"`
}

func (s *Spec) check() error {
	if !strings.HasPrefix(s.Target, "unix:/") {
		host, _, err := net.SplitHostPort(s.Target)
		if ip := net.ParseIP(host); err != nil || ip == nil || !ip.IsLoopback() {
			return fmt.Errorf("target %q is neither a loopback address nor a Unix socket", s.Target)
		}
	}
	switch {
	case s.Count < 1 || s.Count > 50_000_000:
		return errors.New("count is outside 1..50000000")
	case s.Seconds <= 0 || s.Seconds > 3600:
		return errors.New("seconds is outside 0..3600")
	case s.InFlight < 1 || s.InFlight > 10_000:
		return errors.New("in_flight is outside 1..10000")
	case s.Batch < 1 || s.Batch > 1000:
		return errors.New("batch is outside 1..1000")
	case s.Connections < 1 || s.Connections > 64:
		return errors.New("connections is outside 1..64")
	case s.DeadlineMs < 1 || s.DeadlineMs > 60_000:
		return errors.New("deadline_ms is outside 1..60000")
	case s.Open && s.Mode != "plan" && (s.Rate <= 0 || s.Rate > 1e6):
		return errors.New("rate is outside 0..1000000")
	case s.Mode == "meter" && (s.ReportMs < 1 || s.StreamMs < s.ReportMs || s.StreamMs > 600_000):
		return errors.New("report_ms is outside 1..stream_ms, or stream_ms above 600000")
	case s.Mode == "meter" && (s.ReportUnits < 1 || s.HoldUnits < 1):
		return errors.New("report_units or hold_units is below 1")
	}
	return nil
}

// Result is what became of the load. Every intended decision is counted once: in allowed, denied, failed, skipped.
type Result struct {
	Calls     int64            `json:"calls"`     // that were answered
	Decisions int64            `json:"decisions"` // that were answered
	Allowed   int64            `json:"allowed"`
	Replayed  int64            `json:"replayed"` // of the allowed: the key had been answered before
	Denied    map[string]int64 `json:"denied"`   // by reason's number
	Failed    map[string]int64 `json:"failed"`   // by status's number, or by what broke
	Unknown   int64            `json:"unknown"`  // of the failed: they may have been decided all the same
	Skipped   int64            `json:"skipped"`  // not sent: too many were in flight
	Late      int64            `json:"late"`     // of the answered: after their deadline
	Amount    int64            `json:"amount_nanos"`
	Seconds   float64          `json:"seconds"`  // from the first intended send to the last answer
	Offered   float64          `json:"offered"`  // seconds from the first intended send to the last
	Latency   Histogram        `json:"latency"`  // ns, from the intended send; of answers in time
	Lateness  Histogram        `json:"lateness"` // ns, how much after the intended time a call left
	Checked   int64            `json:"replays_checked"`
	Unequal   int64            `json:"replays_unequal"`
	Example   string           `json:"example"` // of what failed

	// meter: a decision is a report that was acknowledged, what is allowed a settlement, a call a stream
	Opening       Histogram `json:"opening"`        // ns, from a stream's opening to its first answer
	Units         int64     `json:"units"`          // that were acknowledged
	SentUnits     int64     `json:"sent_units"`     // that were reported
	StreamSeconds float64   `json:"stream_seconds"` // that streams were open, all together
}

func (r *Result) fail(what string, items int, unknown bool) {
	r.Failed[what] += int64(items)
	if unknown {
		r.Unknown += int64(items)
	}
}

// addTo adds what can be added: all but times.
func (r *Result) addTo(sum *Result) {
	sum.Calls += r.Calls
	sum.Decisions += r.Decisions
	sum.Allowed += r.Allowed
	sum.Replayed += r.Replayed
	sum.Unknown += r.Unknown
	sum.Skipped += r.Skipped
	sum.Late += r.Late
	sum.Amount += r.Amount
	sum.Units += r.Units
	sum.SentUnits += r.SentUnits
	sum.StreamSeconds += r.StreamSeconds
	sum.Latency.Merge(&r.Latency)
	sum.Lateness.Merge(&r.Lateness)
	sum.Opening.Merge(&r.Opening)
	for key, count := range r.Denied {
		sum.Denied[key] += count
	}
	for key, count := range r.Failed {
		sum.Failed[key] += count
	}
	if r.Example != "" {
		sum.Example = r.Example
	}
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "loadgen:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("expected one argument, a JSON object")
	}
	spec := Spec{Batch: 1, Connections: 1, InFlight: 1, DeadlineMs: 5000, Feature: "calls", Speed: 1}
	if err := json.Unmarshal([]byte(os.Args[1]), &spec); err != nil {
		return err
	}
	if err := spec.check(); err != nil {
		return err
	}
	// Whatever happens, there is an end.
	limit := time.Duration(spec.Seconds*float64(time.Second)) + time.Duration(spec.DeadlineMs)*time.Millisecond + 120*time.Second
	time.AfterFunc(limit, func() {
		fmt.Fprintln(os.Stderr, "loadgen: not done within", limit)
		os.Exit(2)
	})
	drive := driveGrpc
	switch spec.Mode {
	case "resp":
		drive = driveResp
	case "http":
		drive = driveHttp
	case "meter":
		drive = driveMeter
	}
	result, err := drive(&spec)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(result)
}

var stdin = bufio.NewReader(os.Stdin)

// handOver tells where we are and waits until we may go on.
func handOver(word string) error {
	fmt.Println(word)
	_, err := stdin.ReadString('\n')
	return err
}

func dial(target string) (net.Conn, error) {
	if path, ok := strings.CutPrefix(target, "unix:"); ok {
		return net.DialTimeout("unix", path, 5*time.Second)
	}
	return net.DialTimeout("tcp", target, 5*time.Second)
}
