package main

import (
	"encoding/json"
	"math/bits"
)

// subBits: each power of two is cut into 2^subBits buckets, so that a value is known to within 1/128.
const subBits = 7

// Histogram counts values >= 0 in buckets whose width grows with the value. Twin of benchmarks/histogram.py.
type Histogram struct {
	counts map[int]int64
	Total  int64
	Max    int64
}

func bucketOf(value int64) int {
	if value < 1<<subBits {
		return int(max(value, 0))
	}
	shift := bits.Len64(uint64(value)) - 1 - subBits
	return (shift+1)<<subBits + int(value>>shift) - 1<<subBits
}

func (h *Histogram) Add(value int64) {
	if h.counts == nil {
		h.counts = make(map[int]int64)
	}
	h.counts[bucketOf(value)]++
	h.Total++
	h.Max = max(h.Max, value)
}

func (h *Histogram) Merge(other *Histogram) {
	if h.counts == nil {
		h.counts = make(map[int]int64)
	}
	for bucket, count := range other.counts {
		h.counts[bucket] += count
	}
	h.Total += other.Total
	h.Max = max(h.Max, other.Max)
}

func (h Histogram) MarshalJSON() ([]byte, error) {
	buckets := make([][2]int64, 0, len(h.counts))
	for bucket, count := range h.counts {
		buckets = append(buckets, [2]int64{int64(bucket), count})
	}
	return json.Marshal(map[string]any{"buckets": buckets, "max": h.Max})
}
