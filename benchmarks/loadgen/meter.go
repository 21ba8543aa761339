package main

import (
	"container/heap"
	"encoding/binary"
	"math/rand"
	"strconv"
	"time"
)

// Fields of gateway.proto, as far as a Meter stream needs them.
const (
	meterOpen, meterReport                        = 1, 2
	reserveHold, reserveCustomer, reserveUsage    = 1, 2, 4
	settleKey, settleUsage, settleFinal           = 3, 4, 5
	settleNumber                                  = 7
	usageDimensions, entryName, entryValue        = 3, 1, 2
	meterSignal, meterAcknowledged, meterSignStop = 1, 5, 3

	tick        = time.Millisecond // how often it is looked whose report is due
	rampSeconds = 1                // in which the first streams are opened, and what is reported is not timed
)

// metering is one stream. It is opened, and reports at fixed times from when it was granted.
type metering struct {
	stream   *stream
	hold     string
	customer []byte
	opened   int64 // ns, 0: not yet
	began    int64 // when its opening was sent
	sent     int   // the number of its last report
	acked    int
	last     int // the number of its final one
}

func (m *metering) due(spec *Spec, number int) int64 {
	return m.opened + int64(number)*int64(spec.ReportMs)*int64(time.Millisecond)
}

// meterLane is one connection with its share of the streams. Everything below is guarded by the connection's lock.
type meterLane struct {
	spec      *Spec
	conn      *conn
	index     int
	customers *Chooser
	random    *rand.Rand
	open      map[uint32]*metering
	waiting   dues // whose next report comes when
	number    int  // of streams that were opened
	timedFrom int64
	stopAt    int64
	last      int64
	result    Result
	usage     []byte // of a report
	reserved  []byte // of an opening
	body, sub []byte
}

// driveMeter keeps so many Meter streams open at a time: where one has ended, another begins. When the time is over no
// other begins, and each goes on to its own end.
func driveMeter(spec *Spec) (*Result, error) {
	lanes := make([]*meterLane, spec.Connections)
	for index := range lanes {
		l := newMeterLane(spec, index)
		conn, err := connect(spec.Target, spec.Path, spec.StreamMs+60_000, l)
		if err != nil {
			return nil, err
		}
		defer conn.close()
		l.conn = conn
		lanes[index] = l
	}
	if err := handOver("begin"); err != nil {
		return nil, err
	}
	start := now()
	for _, l := range lanes {
		l.timedFrom = start + rampSeconds*int64(time.Second)
		l.stopAt = start + int64(spec.Seconds*float64(time.Second))
	}
	meterLoop(spec, lanes, start)
	if err := handOver("end"); err != nil {
		return nil, err
	}
	result := &Result{Denied: map[string]int64{}, Failed: map[string]int64{}}
	last := start
	for _, l := range lanes {
		l.conn.Lock()
		l.result.addTo(result)
		last = max(last, l.last)
		l.conn.Unlock()
	}
	result.Seconds = float64(last-start) / 1e9
	return result, nil
}

// meterLoop opens the first streams one after the other, sends what is due, and returns when all have ended or long
// after they should have.
func meterLoop(spec *Spec, lanes []*meterLane, start int64) {
	limit := start + int64(spec.Seconds*float64(time.Second)) + int64(spec.StreamMs+spec.DeadlineMs+20_000)*int64(time.Millisecond)
	opened, ticker := 0, time.NewTicker(tick)
	defer ticker.Stop()
	for {
		<-ticker.C
		at := now()
		wanted := min(spec.InFlight, int(int64(spec.InFlight)*(at-start)/(rampSeconds*int64(time.Second))))
		for ; opened < wanted; opened++ {
			l := lanes[opened%len(lanes)]
			l.conn.Lock()
			l.begin(1 + l.random.Intn(l.reports())) // Of any length, so that they do not all end together.
			l.conn.Unlock()
		}
		running := opened < spec.InFlight
		for _, l := range lanes {
			l.conn.Lock()
			l.report(at)
			running = running || len(l.open) > 0
			if at > limit {
				l.silent()
			}
			l.conn.flush()
			l.conn.Unlock()
		}
		if !running || at > limit {
			return
		}
	}
}

func newMeterLane(spec *Spec, index int) *meterLane {
	seed := spec.Seed*1000 + int64(index)
	return &meterLane{
		spec:      spec,
		index:     index,
		customers: newChooser(spec.Customers, seed),
		random:    rand.New(rand.NewSource(seed)),
		open:      map[uint32]*metering{},
		result:    Result{Denied: map[string]int64{}, Failed: map[string]int64{}},
		usage:     usageOf(spec, spec.ReportUnits),
		reserved:  usageOf(spec, spec.HoldUnits),
	}
}

func usageOf(spec *Spec, units int) []byte {
	usage := appendBytes(nil, usageFeature, []byte(spec.Feature))
	usage = appendVarint(usage, usageQuantity, uint64(units))
	for name, value := range spec.Dimensions {
		entry := appendBytes(appendBytes(nil, entryName, []byte(name)), entryValue, []byte(value))
		usage = appendBytes(usage, usageDimensions, entry)
	}
	return usage
}

func (l *meterLane) reports() int { return max(1, l.spec.StreamMs/l.spec.ReportMs) }

// begin opens a stream of so many reports. Locked.
func (l *meterLane) begin(reports int) {
	if l.conn.err != nil {
		return
	}
	l.number++
	m := &metering{stream: l.conn.open(), began: now(), last: reports, customer: l.customers.append(nil)}
	m.hold = l.spec.Run + "-" + strconv.Itoa(l.index) + "-" + strconv.Itoa(l.number)
	l.open[m.stream.id] = m
	l.sub = appendBytes(l.sub[:0], reserveHold, []byte(m.hold))
	l.sub = appendBytes(l.sub, reserveCustomer, m.customer)
	l.sub = appendBytes(l.sub, reserveUsage, l.reserved)
	l.send(m, meterOpen, false)
}

// report sends what is due by now. Locked.
func (l *meterLane) report(at int64) {
	for len(l.waiting) > 0 && l.waiting[0].at <= at {
		due := heap.Pop(&l.waiting).(dueReport)
		m := due.of
		if l.open[m.stream.id] != m {
			continue // It has ended before its time.
		}
		l.result.Lateness.Add(now() - due.at)
		m.sent++
		final := m.sent == m.last
		l.sub = appendBytes(l.sub[:0], settleKey, []byte(m.hold+"/"+strconv.Itoa(m.sent)))
		l.sub = appendBytes(l.sub, settleUsage, l.usage)
		if final {
			l.sub = appendVarint(l.sub, settleFinal, 1)
		}
		l.sub = appendVarint(l.sub, settleNumber, uint64(m.sent))
		l.result.SentUnits += int64(l.spec.ReportUnits)
		l.send(m, meterReport, final)
		if !final {
			l.schedule(m)
		}
	}
}

func (l *meterLane) schedule(m *metering) {
	heap.Push(&l.waiting, dueReport{m.due(l.spec, m.sent+1), m})
}

func (l *meterLane) send(m *metering, step int, end bool) {
	l.body = appendBytes(append(l.body[:0], 0, 0, 0, 0, 0), step, l.sub)
	binary.BigEndian.PutUint32(l.body[1:], uint32(len(l.body)-prefixBytes))
	l.conn.send(m.stream, l.body, end)
}

func (l *meterLane) message(s *stream, data []byte) {
	m := l.open[s.id]
	signal, acknowledged, err := readSignal(data)
	if m == nil || err != nil {
		l.result.fail("message", 1, true)
		return
	}
	l.last = now()
	if signal == meterSignStop {
		l.result.fail("stop", 1, false)
	}
	if m.opened == 0 {
		m.opened = l.last
		l.result.Opening.Add(l.last - m.began)
		l.schedule(m)
	}
	if acknowledged > m.acked {
		l.acknowledged(m, min(acknowledged, m.sent))
	}
}

// acknowledged counts one settlement, and the reports that it has charged.
func (l *meterLane) acknowledged(m *metering, number int) {
	l.result.Allowed++
	for ; m.acked < number; m.acked++ {
		l.result.Decisions++
		l.result.Units += int64(l.spec.ReportUnits)
		l.result.Amount += int64(l.spec.ReportUnits) * l.spec.UnitNanos
		due := m.due(l.spec, m.acked+1)
		took := l.last - due
		switch {
		case took > int64(l.spec.DeadlineMs)*int64(time.Millisecond):
			l.result.Late++
		case due >= l.timedFrom && due <= l.stopAt:
			l.result.Latency.Add(took)
		}
	}
}

func (l *meterLane) ended(s *stream, status int) {
	m := l.open[s.id]
	if m == nil {
		return
	}
	l.over(m, strconv.Itoa(status), status == 0)
	if l.last = now(); l.last < l.stopAt {
		l.begin(l.reports())
	}
}

// over is the end of a stream: one that has not come to its last report has failed, and what it has reported may be
// charged all the same.
func (l *meterLane) over(m *metering, why string, good bool) {
	delete(l.open, m.stream.id)
	if m.opened > 0 {
		l.result.StreamSeconds += float64(now()-m.opened) / 1e9
	}
	if good && m.acked == m.last {
		l.result.Calls++
		return
	}
	l.result.fail(why, max(1, m.sent-m.acked), false)
	l.result.Unknown += int64(m.sent - m.acked)
}

func (l *meterLane) silent() {
	for _, m := range l.open {
		l.over(m, "silence", false)
	}
}

func (l *meterLane) broken(err error) {
	l.result.Example = err.Error()
	l.stopAt = 0
	for _, m := range l.open {
		l.over(m, "broken", false)
	}
}

func readSignal(message []byte) (signal uint64, acknowledged int, err error) {
	for len(message) > 0 {
		var f field
		if f, message, err = next(message); err != nil {
			return 0, 0, err
		}
		switch f.number {
		case meterSignal:
			signal = f.value
		case meterAcknowledged:
			acknowledged = int(f.value)
		}
	}
	return signal, acknowledged, nil
}

func appendVarint(to []byte, number int, value uint64) []byte {
	return binary.AppendUvarint(append(to, byte(number<<3|wireVarint)), value)
}

type dueReport struct {
	at int64
	of *metering
}

// dues is a heap, the next first.
type dues []dueReport

func (d dues) Len() int           { return len(d) }
func (d dues) Less(i, j int) bool { return d[i].at < d[j].at }
func (d dues) Swap(i, j int)      { d[i], d[j] = d[j], d[i] }
func (d *dues) Push(x any)        { *d = append(*d, x.(dueReport)) }
func (d *dues) Pop() any {
	old := *d
	last := old[len(old)-1]
	*d = old[:len(old)-1]
	return last
}
