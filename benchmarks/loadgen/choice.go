package main

import (
	"math"
	"math/rand"
	"strconv"
)

// Choice says who asks.
type Choice struct {
	Prefix string  `json:"prefix"`
	Count  int     `json:"count"`
	Zipf   float64 `json:"zipf"`  // customer k of 1..n is drawn with weight k^-zipf; 0: uniform
	Order  bool    `json:"order"` // one after the other instead
	First  int     `json:"first"` // number of the first
}

// Chooser draws customers: alias method, the same time for any distribution.
type Chooser struct {
	choice Choice
	random *rand.Rand
	keep   []float64
	alias  []int32
	next   int
}

func newChooser(choice Choice, seed int64) *Chooser {
	c := &Chooser{choice: choice, random: rand.New(rand.NewSource(seed))}
	if choice.Zipf > 0 && choice.Count > 1 && !choice.Order {
		c.prepare()
	}
	return c
}

func (c *Chooser) prepare() {
	n := c.choice.Count
	scaled, total := make([]float64, n), 0.0
	for k := range scaled {
		scaled[k] = math.Pow(float64(k+1), -c.choice.Zipf)
		total += scaled[k]
	}
	c.keep, c.alias = make([]float64, n), make([]int32, n)
	var small, large []int32
	for k := range scaled {
		scaled[k] *= float64(n) / total
		if scaled[k] < 1 {
			small = append(small, int32(k))
		} else {
			large = append(large, int32(k))
		}
	}
	for len(small) > 0 && len(large) > 0 {
		s, l := small[len(small)-1], large[len(large)-1]
		small = small[:len(small)-1]
		c.keep[s], c.alias[s] = scaled[s], l
		scaled[l] -= 1 - scaled[s]
		if scaled[l] < 1 {
			large = large[:len(large)-1]
			small = append(small, l)
		}
	}
	for _, k := range append(small, large...) {
		c.keep[k], c.alias[k] = 1, k
	}
}

func (c *Chooser) append(to []byte) []byte {
	to = append(to, c.choice.Prefix...)
	return strconv.AppendInt(to, int64(c.choice.First+c.draw()), 10)
}

func (c *Chooser) draw() int {
	n := c.choice.Count
	switch {
	case n <= 1:
		return 0
	case c.choice.Order:
		c.next++
		return (c.next - 1) % n
	case c.keep == nil:
		return c.random.Intn(n)
	}
	k := c.random.Intn(n)
	if c.random.Float64() < c.keep[k] {
		return k
	}
	return int(c.alias[k])
}
