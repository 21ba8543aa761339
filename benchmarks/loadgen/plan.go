package main

import (
	"encoding/binary"
	"errors"
	"os"
)

// plan is a list of requests, each with its time: 8 bytes of microseconds since the first, 4 of length, the request.
type plan struct {
	times    []int64
	requests [][]byte
	at       int
}

func readPlan(spec *Spec) (*plan, error) {
	if spec.Mode != "plan" {
		return nil, nil
	}
	if spec.Connections != 1 {
		return nil, errors.New("a plan goes over one connection")
	}
	data, err := os.ReadFile(spec.File)
	if err != nil {
		return nil, err
	}
	p := &plan{}
	for len(data) >= 12 {
		size := int(binary.LittleEndian.Uint32(data[8:]))
		if len(data) < 12+size {
			return nil, errors.New("the plan is cut short")
		}
		p.times = append(p.times, int64(binary.LittleEndian.Uint64(data)))
		p.requests = append(p.requests, data[12:12+size])
		data = data[12+size:]
	}
	if len(p.times) == 0 {
		return nil, errors.New("the plan is empty")
	}
	spec.Count = min(spec.Count, len(p.times))
	spec.Rate = 1
	return p, nil
}

func (p *plan) due(n int, speed float64) int64 { return int64(float64(p.times[n]) * 1000 / speed) }

func (p *plan) next() []byte {
	p.at++
	return p.requests[(p.at-1)%len(p.requests)]
}
