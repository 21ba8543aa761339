package main

import (
	"bufio"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// Headers of the gateway's front door, by their canonical names.
const (
	headerCharged  = "X-Entitlement-Charged-Nanos"
	headerReplayed = "X-Entitlement-Replayed"
)

// driveHttp sends HTTP/1.1 requests to a proxy, one in flight on each connection. Each names its customer and has an id
// of its own. One that is answered with 200 counts as a decision that was allowed, anything else has failed.
func driveHttp(spec *Spec) (*Result, error) {
	visitors := make([]*visitor, spec.Connections)
	for index := range visitors {
		socket, err := dial(spec.Target)
		if err != nil {
			return nil, err
		}
		defer socket.Close()
		visitors[index] = newVisitor(spec, index, socket)
	}
	if err := handOver("begin"); err != nil {
		return nil, err
	}
	start := now()
	stopAt := start + int64(spec.Seconds*float64(time.Second))
	var group sync.WaitGroup
	for _, v := range visitors {
		group.Add(1)
		go func() {
			defer group.Done()
			v.run(stopAt)
		}()
	}
	group.Wait()
	result := &Result{Denied: map[string]int64{}, Failed: map[string]int64{}, Seconds: float64(now()-start) / 1e9}
	if err := handOver("end"); err != nil {
		return nil, err
	}
	for _, v := range visitors {
		v.result.addTo(result)
	}
	return result, nil
}

type visitor struct {
	spec      *Spec
	socket    net.Conn
	in        *bufio.Reader
	prefix    string
	customers *Chooser
	limit     int
	out       []byte
	result    Result
}

func newVisitor(spec *Spec, index int, socket net.Conn) *visitor {
	limit := spec.Count / spec.Connections
	if index < spec.Count%spec.Connections {
		limit++
	}
	return &visitor{
		spec:      spec,
		socket:    socket,
		in:        bufio.NewReader(socket),
		prefix:    spec.Run + "-" + strconv.Itoa(index) + "-",
		customers: newChooser(spec.Customers, spec.Seed*1000+int64(index)),
		limit:     limit,
		result:    Result{Denied: map[string]int64{}, Failed: map[string]int64{}},
	}
}

func (v *visitor) run(stopAt int64) {
	for number := range v.limit {
		began := now()
		if began > stopAt {
			return
		}
		v.request(number)
		v.socket.SetDeadline(time.Now().Add(time.Duration(v.spec.DeadlineMs) * time.Millisecond))
		if _, err := v.socket.Write(v.out); err != nil {
			v.broken(err)
			return
		}
		if err := v.answer(); err != nil {
			v.broken(err)
			return
		}
		v.result.Latency.Add(now() - began)
	}
}

func (v *visitor) request(number int) {
	v.out = append(v.out[:0], "GET "+v.spec.Path+" HTTP/1.1\r\nhost: bench\r\nx-customer: "...)
	v.out = v.customers.append(v.out)
	v.out = append(v.out, "\r\nx-request-id: "+v.prefix...)
	v.out = strconv.AppendInt(v.out, int64(number), 10)
	v.out = append(v.out, "\r\n\r\n"...)
}

func (v *visitor) answer() error {
	response, err := http.ReadResponse(v.in, nil)
	if err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return err
	}
	response.Body.Close()
	v.result.Calls++
	if response.StatusCode != http.StatusOK {
		v.result.fail("http "+strconv.Itoa(response.StatusCode), 1, response.StatusCode >= 500)
		return nil
	}
	v.result.Decisions++
	v.result.Allowed++
	if response.Header.Get(headerReplayed) != "" {
		v.result.Replayed++
	} else if charged := response.Header.Get(headerCharged); charged != "" {
		nanos, err := strconv.ParseInt(charged, 10, 64)
		v.result.Amount += nanos
		return err
	}
	return nil
}

func (v *visitor) broken(err error) {
	v.result.Example = err.Error()
	v.result.fail("broken", 1, true)
}
