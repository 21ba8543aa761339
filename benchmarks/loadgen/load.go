package main

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"
)

const (
	prefixBytes = 5 // before every gRPC message
	unaryPath   = "/entitlement.v1.EntitlementGateway/CheckAndConsume"
	ringSize    = 1 << 14 // more than a stream has in flight
)

// Statuses after which a call may have been decided all the same.
var unknownStatus = map[int]bool{1: true, 2: true, 4: true, 13: true, 14: true}

var epoch = time.Now()

func now() int64 { return int64(time.Since(epoch)) }

// sample is an allowed request with its answer, to be asked for again.
type sample struct{ request, answer []byte }

// lane is one connection and its part of the load. Everything below is guarded by the connection's lock.
type lane struct {
	spec     *Spec
	conn     *conn
	make     *maker
	plan     *plan
	result   Result
	limit    int // decisions to ask for
	issued   int
	inFlight int // calls; on a stream, requests
	stopAt   int64
	last     int64 // when the last answer came
	calls    int
	sampleAt int     // the next call whose answer is kept
	growth   float64 // of the distance between two such calls: a load of any length gives about as many
	stream   *stream
	ring     []pending // of a stream: what is in flight, by key number
	samples  []sample
	finished chan struct{}
	ending   bool
	message_ []byte
	one      []byte
}

type pending struct {
	due     int64
	request []byte
}

func newLane(spec *Spec, index int) (*lane, error) {
	l := &lane{spec: spec, make: newMaker(spec, index), finished: make(chan struct{})}
	l.result.Denied, l.result.Failed = map[string]int64{}, map[string]int64{}
	l.limit = spec.Count / spec.Connections
	if index < spec.Count%spec.Connections {
		l.limit++
	}
	if spec.Replays > 0 {
		l.growth = math.Pow(1e6, 1/float64(spec.Replays))
	}
	timeoutMs := spec.DeadlineMs
	if l.streamed() { // One call for the whole load.
		timeoutMs += int(spec.Seconds*1000) + 60_000
	}
	conn, err := connect(spec.Target, spec.Path, timeoutMs, l)
	l.conn = conn
	return l, err
}

func (l *lane) streamed() bool { return l.spec.Mode == "stream" }

// issue sends the next call, due at a time; false when there is none. Locked.
func (l *lane) issue(due int64) bool {
	if l.issued >= l.limit || l.ending {
		return false
	}
	sampled := l.growth > 0 && l.calls == l.sampleAt
	if sampled {
		l.sampleAt = max(l.calls+1, int(float64(l.calls)*l.growth))
	}
	l.calls++
	if l.streamed() {
		l.issueOnStream(due, sampled)
		return true
	}
	s := l.conn.open()
	s.due = due
	s.items = min(l.spec.Batch, l.limit-l.issued)
	body := append(l.message_[:0], 0, 0, 0, 0, 0)
	if l.spec.Mode == "batch" {
		for range s.items {
			l.one = l.request(l.one[:0])
			if sampled && len(s.request) == 0 {
				s.request = append(s.request[:0], l.one...)
			}
			body = appendBytes(body, elements, l.one)
		}
	} else {
		body = l.request(body)
		if sampled {
			s.request = append(s.request[:0], body[prefixBytes:]...)
		}
	}
	l.issued += s.items
	l.inFlight++
	binary.BigEndian.PutUint32(body[1:], uint32(len(body)-prefixBytes))
	l.message_ = body
	l.conn.send(s, body, true)
	return true
}

func (l *lane) request(to []byte) []byte {
	if l.plan != nil {
		return append(to, l.plan.next()...)
	}
	return l.make.request(to)
}

func (l *lane) issueOnStream(due int64, sampled bool) {
	if l.stream == nil {
		l.stream = l.conn.open()
		l.ring = make([]pending, ringSize)
	}
	body := l.make.request(append(l.message_[:0], 0, 0, 0, 0, 0))
	p := &l.ring[l.make.number%ringSize]
	p.due, p.request = due, p.request[:0]
	if sampled {
		p.request = append(p.request, body[prefixBytes:]...)
	}
	l.issued++
	l.inFlight++
	binary.BigEndian.PutUint32(body[1:], uint32(len(body)-prefixBytes))
	l.message_ = body
	l.conn.send(l.stream, body, false)
}

// message is one answer's message.
func (l *lane) message(s *stream, data []byte) {
	if l.streamed() {
		l.streamMessage(data)
		return
	}
	s.answered = true
	if l.spec.Opaque {
		l.result.Decisions += int64(s.items)
		l.result.Allowed += int64(s.items)
		return
	}
	if l.spec.Mode != "batch" {
		l.note(data, s.request)
		return
	}
	request := s.request
	for len(data) > 0 {
		f, rest, err := next(data)
		if err != nil {
			l.fail("message", 1, true)
			return
		}
		l.note(f.data, request)
		request, data = nil, rest
	}
}

// note counts one decision; of one that was sampled it keeps the answer.
func (l *lane) note(data, request []byte) {
	a, err := readAnswer(data)
	if err != nil {
		l.fail("message", 1, true)
		return
	}
	switch {
	case a.failed:
		l.fail(strconv.FormatUint(a.code, 10), 1, unknownStatus[int(a.code)])
		return
	case a.verdict == verdictDeny:
		l.result.Denied[strconv.FormatUint(a.reason, 10)]++
	default:
		l.result.Allowed++
		if a.replayed {
			l.result.Replayed++
		} else {
			l.result.Amount += a.amount
			if len(request) > 0 {
				l.samples = append(l.samples, sample{bytes.Clone(request), bytes.Clone(data)})
			}
		}
	}
	l.result.Decisions++
}

func (l *lane) fail(what string, items int, unknown bool) { l.result.fail(what, items, unknown) }

func (l *lane) streamMessage(data []byte) {
	a, err := readAnswer(data)
	at := bytes.LastIndexByte(a.key, '-')
	number, bad := strconv.ParseInt(string(a.key[at+1:]), 10, 64)
	if err != nil || bad != nil {
		l.fail("message", 1, true)
		return
	}
	p := &l.ring[number%ringSize]
	l.note(data, p.request)
	l.arrived(p.due)
	l.inFlight--
	l.result.Calls++
	l.more()
}

// ended is the end of a call.
func (l *lane) ended(s *stream, status int) {
	if l.streamed() {
		if status != 0 || l.inFlight > 0 {
			l.fail(strconv.Itoa(status), l.inFlight, true)
			l.inFlight = 0
		}
		l.finish()
		return
	}
	l.inFlight--
	if status == 0 && s.answered {
		l.result.Calls++
		l.arrived(s.due)
	} else {
		l.fail(strconv.Itoa(status), s.items, unknownStatus[status])
	}
	l.more()
}

func (l *lane) arrived(due int64) {
	l.last = now()
	took := l.last - due
	if took > int64(l.spec.DeadlineMs)*int64(time.Millisecond) {
		l.result.Late++
	} else {
		l.result.Latency.Add(took)
	}
}

// more goes on: with the next call of a closed loop, or to the end.
func (l *lane) more() {
	at := now()
	if !l.spec.Open && at < l.stopAt && l.issue(at) {
		return
	}
	if !l.spec.Open {
		l.ending = true
	}
	if l.ending && l.inFlight == 0 {
		if l.streamed() && l.stream != nil {
			l.conn.send(l.stream, nil, true)
			return
		}
		l.finish()
	}
}

func (l *lane) broken(err error) {
	l.result.Example = err.Error()
	l.fail("broken", l.inFlight*l.spec.Batch, true)
	l.inFlight, l.ending = 0, true
	l.finish()
}

func (l *lane) finish() {
	select {
	case <-l.finished:
	default:
		close(l.finished)
	}
}

// begin fills a closed loop.
func (l *lane) begin(inFlight int) {
	l.conn.Lock()
	defer l.conn.Unlock()
	for range inFlight {
		if !l.issue(now()) {
			break
		}
	}
	if l.inFlight == 0 {
		l.ending = true
		l.finish()
	}
	l.conn.flush()
}

// close says that an open loop has sent its last call.
func (l *lane) close() {
	l.conn.Lock()
	defer l.conn.Unlock()
	l.ending = true
	if l.inFlight == 0 {
		l.more()
	}
	l.conn.flush()
}

func driveGrpc(spec *Spec) (*Result, error) {
	plan, err := readPlan(spec)
	if err != nil {
		return nil, err
	}
	lanes := make([]*lane, spec.Connections)
	for index := range lanes {
		if lanes[index], err = newLane(spec, index); err != nil {
			return nil, err
		}
		lanes[index].plan = plan
		defer lanes[index].conn.close()
	}
	if err := handOver("begin"); err != nil {
		return nil, err
	}
	result := &Result{Denied: map[string]int64{}, Failed: map[string]int64{}}
	start := now()
	stopAt := start + int64(spec.Seconds*float64(time.Second))
	if spec.Open {
		openLoop(spec, plan, lanes, start, stopAt, result)
	} else {
		for index, l := range lanes {
			l.stopAt = stopAt
			share := spec.InFlight / len(lanes)
			if index < spec.InFlight%len(lanes) {
				share++
			}
			l.begin(share)
		}
	}
	wait(spec, lanes, stopAt)
	if err := handOver("end"); err != nil {
		return nil, err
	}
	collect(lanes, start, result)
	if spec.Replays > 0 {
		if err := replay(spec, lanes, result); err != nil {
			return nil, err
		}
	}
	return result, nil
}

// wait returns when every call has ended, or long after it should have.
func wait(spec *Spec, lanes []*lane, stopAt int64) {
	limit := time.After(time.Duration(stopAt-now()) + time.Duration(spec.DeadlineMs)*time.Millisecond + 20*time.Second)
	for _, l := range lanes {
		select {
		case <-l.finished:
		case <-limit:
			l.conn.Lock()
			l.fail("silence", l.inFlight*spec.Batch, true)
			l.conn.Unlock()
			return
		}
	}
}

// openLoop sends calls at their times. A thread of its own sleeps as exactly as the kernel can.
func openLoop(spec *Spec, plan *plan, lanes []*lane, start, stopAt int64, result *Result) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	syscall.RawSyscall(syscall.SYS_PRCTL, 29, 1, 0) // PR_SET_TIMERSLACK, 1 ns
	random := rand.New(rand.NewSource(spec.Seed))
	gap := 1e9 / spec.Rate
	intended, calls := float64(start), (spec.Count+spec.Batch-1)/spec.Batch
	touched := make(map[*lane]struct{}, len(lanes))
	flush := func() {
		for l := range touched {
			l.conn.Lock()
			l.conn.flush()
			l.conn.Unlock()
		}
		clear(touched)
	}
	for n := range calls {
		due := int64(intended)
		if plan != nil {
			due = start + plan.due(n, spec.Speed)
		}
		if due > stopAt {
			break
		}
		if at := now(); at < due {
			flush()
			for at < due {
				left := syscall.NsecToTimespec(due - at)
				syscall.Nanosleep(&left, nil)
				at = now()
			}
		}
		l := lanes[n%len(lanes)]
		l.conn.Lock()
		if l.inFlight >= spec.InFlight/len(lanes) || l.ending {
			items := min(spec.Batch, l.limit-l.issued)
			l.result.Skipped += int64(items)
			l.issued += items
			if plan != nil {
				plan.next()
			}
		} else {
			result.Lateness.Add(now() - due)
			l.issue(due)
		}
		l.conn.Unlock()
		touched[l] = struct{}{}
		result.Offered = float64(due-start) / 1e9
		if spec.Poisson {
			intended += random.ExpFloat64() * gap
		} else {
			intended += gap
		}
	}
	flush()
	for _, l := range lanes {
		l.close()
	}
}

func collect(lanes []*lane, start int64, result *Result) {
	last := start
	for _, l := range lanes {
		l.conn.Lock()
		l.result.addTo(result)
		last = max(last, l.last)
		l.conn.Unlock()
	}
	result.Seconds = float64(last-start) / 1e9
}

// replayer asks again and compares.
type replayer struct {
	sync.Mutex
	conn     *conn
	samples  []sample
	open     map[uint32]int
	next     int
	result   *Result
	finished chan struct{}
	done     bool
}

func replay(spec *Spec, lanes []*lane, result *Result) error {
	r := &replayer{result: result, open: map[uint32]int{}, finished: make(chan struct{})}
	for _, l := range lanes {
		r.samples = append(r.samples, l.samples...)
	}
	if len(r.samples) > spec.Replays {
		r.samples = r.samples[:spec.Replays]
	}
	if len(r.samples) == 0 {
		return nil
	}
	conn, err := connect(spec.Target, unaryPath, spec.DeadlineMs, r)
	if err != nil {
		return err
	}
	defer conn.close()
	r.conn = conn
	conn.Lock()
	for range min(16, len(r.samples)) {
		r.ask()
	}
	conn.flush()
	conn.Unlock()
	select {
	case <-r.finished:
	case <-time.After(30 * time.Second):
	}
	result.Unequal += int64(len(r.samples)) - result.Checked // What was not answered was not equal.
	return nil
}

func (r *replayer) ask() {
	if r.next >= len(r.samples) {
		if len(r.open) == 0 && !r.done {
			r.done = true
			close(r.finished)
		}
		return
	}
	s := r.conn.open()
	r.open[s.id] = r.next
	request := r.samples[r.next].request
	r.next++
	body := append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request))), request...)
	r.conn.send(s, body, true)
}

func (r *replayer) message(s *stream, data []byte) {
	first := r.samples[r.open[s.id]].answer
	a, err := readAnswer(data)
	plain, bad := without(nil, data, responseReplayed)
	r.result.Checked++
	if err != nil || bad != nil || !a.replayed || !bytes.Equal(plain, first) {
		r.result.Unequal++
	}
}

func (r *replayer) ended(s *stream, status int) {
	delete(r.open, s.id)
	r.ask()
}

func (r *replayer) broken(err error) {
	r.result.Example = err.Error()
	if !r.done {
		r.done = true
		close(r.finished)
	}
}
