package main

import (
	"encoding/binary"
	"errors"
	"strconv"
)

// Fields of gateway.proto, as far as a load needs them.
const (
	wireVarint, wireFixed64, wireBytes, wireFixed32 = 0, 1, 2, 5

	requestKey, requestCustomer, requestUsage      = 1, 2, 4
	usageFeature, usageQuantity                    = 1, 2
	responseVerdict, responseReason, responseLines = 1, 2, 3
	responseReplayed, responseKey, responseError   = 5, 9, 13
	lineAmount, errorCode                          = 3, 1
	verdictDeny                                    = 3
	elements                                       = 1 // of a batch, either way
)

var errMessage = errors.New("an answer that does not decode")

func appendBytes(to []byte, field int, data []byte) []byte {
	to = append(to, byte(field<<3|wireBytes))
	to = binary.AppendUvarint(to, uint64(len(data)))
	return append(to, data...)
}

// maker makes requests, each with a key that nothing else has.
type maker struct {
	spec      *Spec
	prefix    string
	usage     []byte
	customers *Chooser
	poor      *Chooser
	number    int64
	name, key []byte
}

func newMaker(spec *Spec, connection int) *maker {
	usage := append([]byte{usageFeature<<3 | wireBytes, byte(len(spec.Feature))}, spec.Feature...)
	usage = append(usage, usageQuantity<<3|wireVarint, 1)
	seed := spec.Seed*1000 + int64(connection)
	m := &maker{
		spec:      spec,
		prefix:    spec.Run + "-" + strconv.Itoa(connection) + "-",
		usage:     appendBytes(nil, requestUsage, usage),
		customers: newChooser(spec.Customers, seed),
	}
	if spec.PoorShare > 0 {
		m.poor = newChooser(spec.Poor, seed+1)
	}
	return m
}

// request appends one CheckAndConsumeRequest.
func (m *maker) request(to []byte) []byte {
	m.number++
	m.key = strconv.AppendInt(append(m.key[:0], m.prefix...), m.number, 10)
	chooser := m.customers
	if m.poor != nil && m.customers.random.Float64() < m.spec.PoorShare {
		chooser = m.poor
	}
	m.name = chooser.append(m.name[:0])
	to = appendBytes(to, requestKey, m.key)
	to = appendBytes(to, requestCustomer, m.name)
	return append(to, m.usage...)
}

// field is one field of a message.
type field struct {
	number int
	value  uint64 // of a varint
	data   []byte // of bytes
	whole  []byte // as it lies on the wire
}

// next cuts the first field off a message.
func next(message []byte) (field, []byte, error) {
	tag, n := binary.Uvarint(message)
	if n <= 0 {
		return field{}, nil, errMessage
	}
	f, at := field{number: int(tag >> 3)}, n
	switch tag & 7 {
	case wireVarint:
		f.value, n = binary.Uvarint(message[at:])
		if n <= 0 {
			return field{}, nil, errMessage
		}
		at += n
	case wireFixed64:
		at += 8
	case wireFixed32:
		at += 4
	case wireBytes:
		size, n := binary.Uvarint(message[at:])
		if n <= 0 || size > uint64(len(message)-at-n) {
			return field{}, nil, errMessage
		}
		f.data = message[at+n : at+n+int(size)]
		at += n + int(size)
	default:
		return field{}, nil, errMessage
	}
	if at > len(message) {
		return field{}, nil, errMessage
	}
	f.whole = message[:at]
	return f, message[at:], nil
}

// answer is what a load wants to know of a CheckAndConsumeResponse.
type answer struct {
	verdict, reason uint64
	amount          int64
	replayed        bool
	failed          bool
	code            uint64
	key             []byte
}

func readAnswer(message []byte) (a answer, err error) {
	for len(message) > 0 {
		var f field
		if f, message, err = next(message); err != nil {
			return a, err
		}
		switch f.number {
		case responseVerdict:
			a.verdict = f.value
		case responseReason:
			a.reason = f.value
		case responseReplayed:
			a.replayed = f.value == 1
		case responseKey:
			a.key = f.data
		case responseLines:
			amount, err := varintIn(f.data, lineAmount)
			if err != nil {
				return a, err
			}
			a.amount += int64(amount)
		case responseError:
			a.failed = true
			if a.code, err = varintIn(f.data, errorCode); err != nil {
				return a, err
			}
		}
	}
	return a, nil
}

func varintIn(message []byte, number int) (found uint64, err error) {
	for len(message) > 0 {
		var f field
		if f, message, err = next(message); err != nil {
			return 0, err
		}
		if f.number == number {
			found = f.value
		}
	}
	return found, nil
}

// without appends a message but for one of its fields.
func without(to, message []byte, number int) ([]byte, error) {
	for len(message) > 0 {
		f, rest, err := next(message)
		if err != nil {
			return nil, err
		}
		if f.number != number {
			to = append(to, f.whole...)
		}
		message = rest
	}
	return to, nil
}
